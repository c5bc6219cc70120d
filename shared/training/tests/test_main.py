"""The command line: exit codes, one line on standard error, and tables of what has been run."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.claims.commands import main, overrides_of, parse, silence_library_logs
from shared.claims.compose import row_config
from shared.errors import RunInterrupted, UserError
from shared.run.tests.conftest import OWN, PLAIN
from shared.training.application import run_folder


def reproduce(tmp_path, *arguments) -> int:
    return main(["reproduce", "pdml", "--results", str(tmp_path), *arguments])


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["reproduce", "pdml", "--rows", "synthetic-random-ssrn-plane"], f"did you mean {PLAIN}"),
        (["reproduce", "pdml", "--rows", PLAIN, "optim.learning_rate=1"], "'learning_rate'"),
        (["reproduce", "pdml", "--scale", "huge"], "choose one of demo, lite, full"),
        (["reproduce", "pdlm"], "choose one of"),
        (["reproduce", "pdml", "--seeds", "0,one"], "'one' is no seed"),
        (["reproduce", "pdml", "--seeds=-1"], "'-1' is no seed"),
        (["reproduce", "pdml", "--seeds", "4294967296"], "from 0 to 4294967295"),
        (["reproduce", "pdml", "seed=3"], "SEEDS="),
        (["reproduce", "pdml", "--sedes", "0"], "--sedes"),
        (["reproduce"], "one paper or --all"),
        (["reproduce", "pdml", "--all"], "one paper or --all"),
        (["evaluate", "pdml"], "--row"),
        (["evaluate", "pdml", "--row", "nope"], "did you mean"),
        (["evaluate", "pdlm", "--row", PLAIN], "choose one of"),
        (["train", "pdml"], "'train'"),
        ([], "command"),
    ],
)
def test_bad_command_is_one_line_and_code_2_and_nothing_is_written(
    arguments, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "40")
    where = ["--results", str(tmp_path)] if arguments else []
    assert main([*arguments, *where]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and err.endswith("\n") and out == ""
    assert files(tmp_path) == []


def test_table_shows_what_has_been_run_into_another_folder_of_results(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert reproduce(tmp_path, "--rows", f"{PLAIN}, {OWN}", "--seeds", "0,1", "optim.lr=0.5") == 0
    out, err = capsys.readouterr()
    assert "4 runs at scale demo, about 8 s" in out and out.count("25.50 ± 0.71") == 2 and err == ""
    folder = tmp_path / "pdml" / "demo"
    assert files(folder) == sorted(f"{row}/seed{seed}.json" for row in (PLAIN, OWN) for seed in (0, 1))
    assert reproduce(tmp_path, "--rows", PLAIN, "--seeds", "0,1", "optim.lr=0.5") == 0
    assert "nothing to run" in capsys.readouterr().out


def test_failed_run_is_one_line_the_others_are_measured_and_the_code_is_2(fake, tmp_path, capsys, caplog):
    def run(cfg, folder):
        if cfg.row == PLAIN:
            raise UserError("cube[1].mat\nis missing: " + "put it there " * 20)
        return {"n_test": 10.0, "oa": 0.25}

    fake.run = run
    assert reproduce(tmp_path, "--rows", f"{PLAIN},{OWN}", "--seeds", "0,1") == 2
    out, err = capsys.readouterr()
    assert (
        err.startswith(f"{PLAIN} seed 0 and 1 more failed: cube[1].mat is missing: put it")
        and err.count("\n") == 1
    )
    assert "25.00" in out and f"demo/{OWN}/seed1.json" in files(tmp_path / "pdml")
    # The job's own log says the same for launchers that run elsewhere; here it would be said twice.
    assert "is missing" not in caplog.text


def test_error_that_is_no_mistake_of_the_user_gives_code_1_and_the_trace(fake, tmp_path, capsys):
    def run(cfg, folder):
        raise ZeroDivisionError("of ours")

    fake.run = run
    assert reproduce(tmp_path, "--rows", PLAIN) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1] == f"{PLAIN} seed 0 failed: ZeroDivisionError: of ours"


@pytest.mark.parametrize(("stop", "code"), [(RunInterrupted(143), 143), (KeyboardInterrupt(), 130)])
def test_a_run_that_is_stopped_is_one_line_a_code_of_its_own_and_no_other_run(
    stop, code, fake, tmp_path, capsys
):
    begun = []

    def run(cfg, folder):
        begun.append(cfg.row)
        raise stop

    fake.run = run
    assert reproduce(tmp_path, "--rows", f"{PLAIN},{OWN}") == code and begun == [PLAIN]
    assert capsys.readouterr().err == "stopped; the same command goes on from the last checkpoint\n"
    assert not [name for name in files(tmp_path) if name.endswith(".json")]


def test_nothing_is_launched_where_no_row_can_start(fake, tmp_path, capsys):
    def seconds_of_run(cfg):
        raise UserError("cube.mat is missing: put it there")

    fake.seconds_of_run = seconds_of_run
    assert reproduce(tmp_path, "--rows", f"{PLAIN},{OWN}") == 2
    assert capsys.readouterr().err == "cube.mat is missing: put it there\n" and files(tmp_path) == []


def test_data_root_and_results_may_hold_any_sign(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "the 'data', (old)=1")
    options = parse(["reproduce", "pdml", "--results", "a, b"])
    cfg = row_config("pdml", PLAIN, 0, overrides_of(options, "pdml"))
    assert Path(cfg.paths.data_root).name == "the 'data', (old)=1"
    assert (Path(cfg.paths.results).parts[-2:], Path(cfg.paths.runs).parts[-3:]) == (
        ("a, b", "pdml"),
        ("a, b", "pdml", "runs"),
    )


def evaluate(tmp_path, *arguments) -> int:
    return main(["evaluate", "pdml", "--results", str(tmp_path), "--row", PLAIN, "--seed", "1", *arguments])


@pytest.fixture
def checkpoint(tmp_path):
    """The last checkpoint of the row and seed that ``evaluate`` asks for, where its run would have left it."""
    options = parse(["evaluate", "pdml", "--results", str(tmp_path), "--row", PLAIN])
    path = run_folder(row_config("pdml", PLAIN, 1, overrides_of(options, "pdml"))) / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


def test_row_without_checkpoint_is_told_how_to_train_it(tmp_path, capsys):
    assert evaluate(tmp_path) == 2
    err = capsys.readouterr().err
    assert "last.ckpt is missing" in err and err.count("\n") == 1
    assert f"`make reproduce-pdml SCALE=demo ROWS={PLAIN} SEEDS=1`" in err


def test_a_folder_is_no_checkpoint(tmp_path, capsys):
    assert evaluate(tmp_path, "--ckpt", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"{tmp_path} is no file: name a checkpoint in it with CKPT= (--ckpt)\n"


def test_evaluation_takes_the_last_checkpoint_and_a_new_folder_for_its_pictures(
    tmp_path, checkpoint, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    seen = []

    def evaluate_checkpoint(cfg, path, folder):
        seen.append((cfg.seed, path, folder))
        folder.mkdir()
        return {"oa": 0.875, "per_class": [1.0, None], "classes_scored": "1 of 2", "n_test": 7.0}

    monkeypatch.setitem(
        sys.modules, "pdml.evaluate", SimpleNamespace(evaluate_checkpoint=evaluate_checkpoint)
    )
    assert evaluate(tmp_path) == 0 and evaluate(tmp_path) == 0
    folders = [checkpoint.with_name(f"evaluation-{number}") for number in (1, 2)]
    assert seen == [(1, checkpoint, folder) for folder in folders]
    out = capsys.readouterr().out
    for text in (
        "OA %",
        "87.50",
        "100.00, –",
        "1 of 2",
        f"checkpoint: {checkpoint}",
        f"pictures: {folders[1]}",
    ):
        assert text in out


def test_pictures_never_go_into_a_folder_that_holds_something(tmp_path, checkpoint, capsys):
    assert evaluate(tmp_path, "--out", str(checkpoint.parent)) == 2
    assert "give a new folder with OUT=" in capsys.readouterr().err and checkpoint.read_bytes() == b"weights"


def test_chatter_of_the_libraries_is_silenced_and_our_warnings_are_not():
    silence_library_logs()
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)
    assert logging.getLogger("shared.training.guard").isEnabledFor(logging.WARNING)
