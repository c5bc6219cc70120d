"""The command line: exit codes, one line on standard error, and tables of what has been run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import __main__ as commands
from commands import reproduce as launching
from commands.__main__ import claim_lines, main, overrides_of, parse
from shared.claims.compose import row_config
from shared.claims.protocol import Paper
from shared.environment import repository_root
from shared.errors import RunInterrupted, UserError
from shared.training.tests.paper import quick


@pytest.fixture
def run(paper, start, monkeypatch):
    """Run a command on the repository that has the paper; what it starts runs in this process."""
    monkeypatch.setattr(launching, "run_command", start)
    monkeypatch.setattr(commands, "run_command", start)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> int:
        return main([arguments[0], "--root", str(paper.parent), *arguments[1:]])

    return command


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["reproduce", "fake", "--rows", "plane"], "did you mean plain"),
        (["reproduce", "fake", "--rows", "plain", "trainer.device=1"], "'device'"),
        (["reproduce", "fake", "--scale", "huge"], "choose one of demo, lite, full"),
        (["reproduce", "fkae"], "choose one of fake"),
        (["reproduce", "fake", "--seeds", "0,one"], "'one' is no seed"),
        (["reproduce", "fake", "--seeds=-1"], "'-1' is no seed"),
        (["reproduce", "fake", "--seeds", "4294967296"], "from 0 to 4294967295"),
        (["reproduce", "fake", "seed=3"], "SEEDS="),
        (["reproduce", "fake", "--sedes", "0"], "--sedes"),
        (["reproduce"], "one paper or --all"),
        (["reproduce", "fake", "--all"], "one paper or --all"),
        (["evaluate", "fake"], "--row"),
        (["evaluate", "fake", "--row", "nope"], "did you mean"),
        (["evaluate", "fkae", "--row", "plain"], "choose one of"),
        (["show", "fake", "--row", "plane"], "did you mean plain"),
        (["show", "fake", "--row", "plain", "optim.lr"], "optim.lr"),
        (["tables", "--paper", "fkae"], "choose one of fake"),
        (["train", "fake"], "'train'"),
    ],
)
def test_bad_command_is_one_line_and_code_2_and_nothing_is_written(run, arguments, words, paper, capsys):
    before = files(paper)
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and err.endswith("\n") and out == ""
    assert files(paper) == before


def test_no_command_is_one_line_and_code_2(capsys):
    assert main([]) == 2
    assert "command" in capsys.readouterr().err


def test_table_shows_what_has_been_run_into_another_folder_of_results(run, tmp_path, capsys):
    command = ["reproduce", "fake", "--results", str(tmp_path / "r"), "--seeds", "0,1", "optim.lr=0.5"]
    assert run(*command, "--rows", "plain, new") == 0
    out = capsys.readouterr().out
    assert "4 runs at scale demo, about 8 s" in out and out.count("25.50 ± 0.71") == 2
    folder = tmp_path / "r" / "fake" / "demo"
    assert files(folder) == sorted(f"{row}/seed{seed}.json" for row in ("plain", "new") for seed in (0, 1))
    assert run(*command, "--rows", "plain") == 0
    assert "nothing to run" in capsys.readouterr().out


def test_failed_run_is_one_line_the_others_are_measured_the_table_is_printed_and_the_code_is_2(
    run, paper, capsys, fake
):
    def train(cfg, folder):
        if cfg.row == "plain":
            raise UserError("cube[1].mat\nis missing: " + "put it there " * 20)
        return quick(cfg, folder)

    fake.run = train
    assert run("reproduce", "fake", "--seeds", "0,1") == 2
    out, err = capsys.readouterr()
    assert "plain seed 0 and 1 more failed: cube[1].mat is missing: put it there" in err
    assert "25.50 ± 0.71" in out and "results/demo/new/seed1.json" in files(paper)


def test_tables_are_printed_where_no_row_can_start_and_nothing_is_launched(run, tmp_path, fake, capsys):
    def seconds_of_run(cfg):
        raise UserError("cube.mat is missing: put it there")

    fake.seconds_of_run = seconds_of_run
    assert run("reproduce", "fake", "--results", str(tmp_path / "r")) == 2
    out, err = capsys.readouterr()
    assert err == "cube.mat is missing: put it there\n" and "not run" in out
    assert not (tmp_path / "r").exists()


def test_a_row_that_runs_by_name_alone_is_in_the_table_once_it_was_asked_for_or_measured(run, paper, capsys):
    ledger = paper / "metafile.yml"
    new = next(line for line in ledger.read_text().splitlines() if "Row: new," in line)
    ledger.write_text(ledger.read_text().replace(new, new.replace("Row: new,", "Row: new, Default: false,")))

    def printed(*options: str) -> list[str]:
        assert run("reproduce", "fake", *options) == 0
        return [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]

    assert printed() == ["plain"]
    assert printed("--rows", "new") == ["plain", "new"]
    assert printed() == ["plain", "new"]


def test_all_runs_every_paper_and_a_paper_that_fails_does_not_keep_the_others(run, paper, capsys, monkeypatch):
    codes = iter([1, 2, 0])
    (paper.parent / "other").symlink_to(paper)
    (paper.parent / "third").symlink_to(paper)
    planned = []

    def plan(paper, *arguments):
        planned.append(paper.name)
        return [paper.name]

    monkeypatch.setattr(commands, "plan", plan)
    monkeypatch.setattr(commands, "run_jobs", lambda *arguments: next(codes))
    monkeypatch.setattr(commands, "own_tables", lambda of, scale, unasked: [commands.Table(of.paper.name, ["a"], [])])
    assert run("reproduce", "--all") == 1
    assert planned == ["fake", "other", "third"]
    assert all(name in capsys.readouterr().out for name in ("fake",)) and next(codes, None) is None


@pytest.mark.parametrize(("stop", "code"), [(RunInterrupted(143), 143), (KeyboardInterrupt(), 130)])
def test_a_run_that_is_stopped_is_one_line_and_a_code_of_its_own(stop, code, run, fake, paper, capsys):
    def train(cfg, folder):
        raise stop

    fake.run = train
    assert run("reproduce", "fake") == code
    line = "interrupted; the same command continues from the last checkpoint\n"
    assert capsys.readouterr().err == 2 * line  # the training's, and that of the command that started it
    assert not [name for name in files(paper) if name.endswith(".json")]


def test_data_root_and_results_may_hold_any_sign(paper, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "the 'data', (old)=1")
    options = parse(["reproduce", "fake", "--results", "a, b"])
    cfg = row_config(Paper("fake", paper.parent), "plain", 0, overrides_of(options, "fake"))
    assert Path(cfg.paths.data_root).name == "the 'data', (old)=1"
    assert (Path(cfg.paths.results).parts[-2:], Path(cfg.paths.runs).parts[-3:]) == (
        ("a, b", "fake"),
        ("a, b", "fake", "runs"),
    )


def test_show_says_what_a_row_is_and_whether_it_was_measured(run, paper, capsys):
    assert run("show", "fake", "--row", "new") == 0
    out = capsys.readouterr().out
    for line in ("own row: new (Digits)", "compared with plain", "evidence: not run", "cost: about 2 s", "name: large"):
        assert line in out
    assert "command: python -m fake.train +experiment=new seed=0" in out
    assert run("reproduce", "fake", "--rows", "new") == 0
    record = paper / "results/demo/new/seed0.json"
    record.write_text(record.read_text().replace('"row": "new"', '"row": "older"'))  # the row's former name
    capsys.readouterr()
    assert run("show", "fake", "--row", "new") == 0
    assert f"evidence: measured ({record})" in capsys.readouterr().out
    assert run("show", "fake", "--row", "new", "optim.lr=7") == 0
    assert f"evidence: stale ({record})" in capsys.readouterr().out


def test_show_says_why_the_cost_of_a_row_is_not_known(run, fake, capsys):
    def seconds_of_run(cfg):
        raise UserError("cube.mat is missing: put it there")

    fake.seconds_of_run = seconds_of_run
    assert run("show", "fake", "--row", "new") == 0
    assert "\ncost: not known, cube.mat is missing: put it there\n" in capsys.readouterr().out


def test_show_prints_claim_baseline_and_status(repository):
    lines = claim_lines(Paper("fake", repository.root).ledger, "fake-a")
    assert lines == [
        "claim: fake-a (none, T1, ours)",
        "paper: top1 76.20; baseline theirs",
        "status: not-run; needs a week",
    ]


def test_tables_command_writes_checks_and_reports(repository, capsys):
    root = ["tables", "--root", str(repository.root)]
    assert main([*root, "--check"]) == 2
    assert main(root) == 0
    assert main([*root, "--check"]) == 0
    assert main([*root, "--paper", "fake"]) == 0
    capsys.readouterr()
    assert main([*root, "--report"]) == 0
    assert "fake-a" in capsys.readouterr().out
    assert main([*root, "--paper", "none"]) == 2
    error = capsys.readouterr().err
    assert "none" in error and error.count("\n") == 1


def test_evaluate_starts_the_papers_application_and_returns_its_code(run, paper, capsys):
    assert run("evaluate", "fake", "--row", "plain", "--seed", "1") == 2
    assert "SCALE=demo ROWS=plain SEEDS=1" in capsys.readouterr().err
    checkpoint = paper / "the 'last'.ckpt"
    checkpoint.write_bytes(b"weights")
    out = str(paper / "pictures")
    assert run("evaluate", "fake", "--row", "plain", "--ckpt", str(checkpoint), "--out", out) == 0
    shown = capsys.readouterr().out
    assert f"checkpoint: {checkpoint}" in shown and f"pictures: {out}" in shown


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_training_and_ends_all_with_its_code(paper, number, code):
    command = ["reproduce", "fake", "--root", str(paper.parent), "--rows", "plain,new", "behaviour=waits"]
    process = subprocess.Popen(
        [sys.executable, "-m", "commands", *command, "--results", str(paper.parent / "r")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has what it starts in the background ignore Ctrl-C, which is passed on to children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not (started := list((paper.parent / "r").rglob("started"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    training = int(started[0].read_text())
    if number == signal.SIGINT:  # as a terminal does it
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(240) == code
    assert not Path(f"/proc/{training}").exists() and len(list((paper.parent / "r").rglob("started"))) == 1


@pytest.mark.slow
def test_the_ledger_and_its_commands_need_no_torch():
    paths = [
        path for folder in ("shared/claims", "commands") for path in sorted((repository_root() / folder).glob("*.py"))
    ]
    names = [".".join(path.relative_to(repository_root()).with_suffix("").parts) for path in paths]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "try: sys.modules['commands.__main__'].main(['tables', '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository_root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
