"""One run: its record, its lock, what a failure leaves, and the exit codes of an application."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from shared.command_line import run_command, silence_library_logs
from shared.environment import repository_root
from shared.errors import RunInterrupted, UserError
from shared.training import application
from shared.training.application import command, folder_lock, measure, run_job
from shared.training.config import evidence_path, failure_path, has_evidence, run_folder
from shared.training.tests.paper import quick


def test_evidence_is_written_at_the_end_and_never_by_a_run_that_failed(config):
    cfg = config()
    path, seen = evidence_path(cfg), []

    def train(cfg, folder):
        seen.append(path.exists())
        (folder / "last.ckpt").write_bytes(b"half-way")
        if len(seen) == 1:
            raise RuntimeError("killed")
        return quick(cfg, folder)

    with pytest.raises(RuntimeError):
        measure(cfg, train)
    assert not path.exists()
    assert measure(cfg, train).startswith("OA % 25.00") and seen == [False, False]
    record = json.loads(path.read_text())
    assert record["metrics"] == {"oa": 0.25, "resumed": 1.0} and record["n_test"] == 10
    assert "paths" not in record["config"] and record["config"]["optim"]["lr"] == 0.1
    assert measure(cfg, train) == "already measured"
    path.write_text(json.dumps(record | {"config_sha256": "0" * 64}))
    old, seen[:] = path.read_bytes(), []
    assert not has_evidence(cfg)
    with pytest.raises(RuntimeError):
        measure(cfg, train)
    assert path.read_bytes() == old and (run_folder(cfg) / "last.ckpt").read_bytes() == b"half-way"


def test_a_run_that_is_not_resumed_says_so_unless_the_paper_knows_better(config):
    measure(config(), quick)
    assert json.loads(evidence_path(config()).read_text())["metrics"]["resumed"] == 0.0
    measure(config("new"), lambda cfg, folder: quick(cfg, folder) | {"resumed": 1.0})
    assert json.loads(evidence_path(config("new")).read_text())["metrics"]["resumed"] == 1.0


def test_runs_of_another_seed_or_configuration_have_another_folder(config):
    cfgs = [config(), config("plain", 1), config("plain", 0, "optim.lr=7"), config("new")]
    assert len({run_folder(cfg) for cfg in cfgs}) == len(cfgs)
    assert run_folder(config("plain", 0, "trainer.workers=2")) == run_folder(config())


def _hold(folder, connection):
    with folder_lock(folder) as is_held:
        connection.send(is_held)
        signal.pause()


def test_two_processes_do_not_run_the_same_row_and_seed_and_a_killed_one_lets_go(config):
    cfg, other = config(), config("plain", 1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(run_folder(cfg), theirs))
    process.start()
    try:
        assert ours.poll(60) and ours.recv()
        assert measure(cfg, quick) == "running elsewhere" and not evidence_path(cfg).exists()
        assert measure(other, quick).startswith("OA %")
        several = config("plain", 0, "trainer.accelerator=cpu", "trainer.devices=2")
        with pytest.raises(UserError, match="is in use by another run"):
            measure(several, quick)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert measure(cfg, quick).startswith("OA %")


def test_of_several_ranks_the_first_one_writes_the_record(config, monkeypatch):
    cfg, ran = config("plain", 0, "trainer.accelerator=cpu", "trainer.devices=2"), []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NODE_RANK", "0")
    assert measure(cfg, lambda cfg, folder: ran.append(folder)) == "measured by rank 0"
    assert ran == [run_folder(cfg)] and not evidence_path(cfg).exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    measure(cfg, quick)
    assert evidence_path(cfg).exists()


def test_a_job_returns_its_first_metric_and_forgets_an_earlier_failure(config, caplog):
    cfg = config("plain", 1)
    failure_path(cfg).parent.mkdir(parents=True)
    failure_path(cfg).write_text("of yesterday\n")
    with caplog.at_level(logging.INFO, "shared.training.application"):
        assert run_job(cfg, quick) == 0.26
        assert not failure_path(cfg).exists() and "plain seed 1: OA % 26.00" in caplog.text
        assert run_job(cfg, quick) == 0.26
    assert "plain seed 1: already measured" in caplog.text


def test_what_the_papers_own_check_refuses_is_not_trained(config, capsys):
    def check(cfg):
        raise UserError("this task is not implemented yet")

    with pytest.raises(SystemExit) as ended:
        run_job(config(), quick, check)
    assert ended.value.code == 2 and capsys.readouterr().err == "this task is not implemented yet\n"
    assert failure_path(config()).read_text() == "this task is not implemented yet\n"


def test_a_failure_keeps_its_traceback_and_gives_code_1(config, capsys):
    def train(cfg, folder):
        raise ZeroDivisionError("of ours")

    with pytest.raises(SystemExit) as ended:
        run_job(config(), train)
    kept = failure_path(config()).read_text()
    assert ended.value.code == 1 and kept.startswith("ZeroDivisionError: of ours\nTraceback")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("cube.mat is missing:\nput it there"), 2, "cube.mat is missing: put it there\n"),
        (ZeroDivisionError("of ours"), 1, "Traceback"),
        (RunInterrupted(143), 143, "interrupted; the same command continues from the last checkpoint\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues from the last checkpoint\n"),
    ],
)
def test_an_application_ends_with_the_code_of_what_ended_it(error, code, words, capsys, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")

    @command
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == code and words in err and (code == 1 or err.count("\n") == 1)


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["behaviour=trains"], 0, ""),
        (["behaviour=refuses"], 2, "cube[1].mat is missing: put it there\n"),
        (["behaviour=fails"], 1, "ZeroDivisionError: of ours"),
        (["optim.lr"], 2, "optim.lr"),
        (["modle=x"], 2, "modle"),
        (["+experiment=plane"], 2, "experiment/plane"),
        (["trainer.devices=two"], 2, "two"),
        (["optim.precision=16-mixed"], 2, "16-mixed is not supported"),
    ],
)
def test_hydras_application_ends_so(start, overrides, code, words, capsys):
    assert start(["python", "-m", "fake.train", *overrides]) == code
    err = capsys.readouterr().err
    assert words in err and (code != 2 or err.count("\n") == 1)


def test_a_multirun_goes_on_behind_a_failure_and_ends_with_its_code(start, config, capfd):
    line = ["python", "-m", "fake.train", "-m", "seed=0,1", "+experiment=plain"]
    assert start([*line, "behaviour=refuses"]) == 2
    texts = [failure_path(config("plain", seed, "behaviour=refuses")).read_text() for seed in (0, 1)]
    assert texts == ["cube[1].mat is missing: put it there\n"] * 2
    assert start(line) == 0 and all(has_evidence(config("plain", seed)) for seed in (0, 1))


def test_a_job_of_a_multirun_on_several_devices_is_a_process_of_its_own(start, config, monkeypatch):
    commands, codes = [], iter([0, 2, 1, 143])
    monkeypatch.setattr(application, "run_command", lambda line: commands.append(line) or next(codes))
    line = ["python", "-m", "fake.train", "-m", "trainer.devices=2", "trainer.accelerator=cpu", "+experiment=plain"]
    assert [start(line) for _ in range(4)] == [0, 2, 1, 143]
    assert commands[0][1:3] == ["-m", "fake.train"] and "-m" not in commands[0][3:]
    assert {"trainer.devices=2", "+experiment=plain"} <= set(commands[0])
    monkeypatch.setenv("LOCAL_RANK", "0")  # Lightning has started this process as a rank
    assert start(line) == 0 and len(commands) == 4
    assert has_evidence(config())


@pytest.mark.parametrize(("code", "shown"), [("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_command_inside_a_command_gives_its_code(code, shown):
    assert run_command([sys.executable, "-c", code]) == shown


def test_sigterm_is_passed_on_and_waited_for(tmp_path):
    child = (
        "import signal, sys, time, pathlib\n"
        "def end(*received): time.sleep(0.5); pathlib.Path('saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path('ready').touch(); time.sleep(60)"
    )
    run = f"run_command([sys.executable, '-c', {child!r}])"
    parent = f"import sys; from shared.command_line import run_command; sys.exit({run})"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(repository_root())}
    )
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        signal.sigtimedwait([], 0.1)
    process.terminate()
    assert process.wait(60) == 143 and (tmp_path / "saved").exists()


def test_chatter_of_the_libraries_is_silenced_and_our_warnings_are_not():
    silence_library_logs()
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)
    assert logging.getLogger("shared.training.guard").isEnabledFor(logging.WARNING)
