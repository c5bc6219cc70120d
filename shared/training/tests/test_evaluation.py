"""Scoring a checkpoint: which one, where its pictures go, what is printed."""

import pytest

from shared.training.config import run_folder


@pytest.fixture
def evaluate(start, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *overrides: start(["python", "-m", "fake.evaluate", "+experiment=plain", "seed=1", *overrides])


@pytest.fixture
def checkpoint(config):
    """The last checkpoint of the row and seed, where its run would have left it."""
    path = run_folder(config("plain", 1)) / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


def test_row_without_checkpoint_is_told_how_to_train_it(evaluate, paper, capsys):
    assert evaluate() == 2
    err = capsys.readouterr().err
    assert "last.ckpt is missing" in err and err.count("\n") == 1
    assert "`make reproduce-fake SCALE=demo ROWS=plain SEEDS=1`" in err
    assert not (paper.parent / "runs").exists()


def test_a_folder_is_no_checkpoint(evaluate, tmp_path, capsys):
    assert evaluate(f"ckpt={tmp_path}") == 2
    assert capsys.readouterr().err == f"{tmp_path} is not a file: name a checkpoint in it with CKPT= (ckpt=)\n"


def test_evaluation_takes_the_last_checkpoint_and_a_new_folder_for_its_pictures(evaluate, checkpoint, capsys):
    assert evaluate() == 0 and evaluate() == 0
    assert all(checkpoint.with_name(f"evaluation-{number}").is_dir() for number in (1, 2))
    out = capsys.readouterr().out
    for text in (
        "plain, seed 1",
        "OA %",
        "87.50",
        "100.00, –",
        "1 of 2",
        f"checkpoint: {checkpoint}",
        f"pictures: {checkpoint.with_name('evaluation-2')}",
    ):
        assert text in out


def test_another_checkpoint_may_be_named_and_another_folder(evaluate, tmp_path, capsys):
    (tmp_path / "other.ckpt").write_bytes(b"weights")
    assert evaluate(f"ckpt={tmp_path / 'other.ckpt'}", f"out={tmp_path / 'pictures'}") == 0
    assert f"pictures: {tmp_path / 'pictures'}" in capsys.readouterr().out


def test_pictures_never_go_into_a_folder_that_holds_something(evaluate, checkpoint, capsys):
    assert evaluate(f"out={checkpoint.parent}") == 2
    assert "give a new folder with OUT=" in capsys.readouterr().err and checkpoint.read_bytes() == b"weights"


def test_a_machine_that_cannot_compute_it_is_refused(evaluate, checkpoint, capsys):
    assert evaluate("optim.precision=16-mixed") == 2
    assert "16-mixed is not supported" in capsys.readouterr().err
