"""Bad input ends an application with code 2 and one line that says what is wrong and what to do; nothing is lost."""

import json

import pytest
import torch

from commands.__main__ import main
from shared.testing.applications import Finished, call_application
from shared.testing.contract import Bad
from shared.training.config import evidence_path, run_folder
from tests.contracts.papers import of_papers

FLOAT16 = Bad(["optim.precision=16-mixed"], "optim.precision=16-mixed", "choose one of 32-true")
DEVICES = Bad(
    ["trainer.devices=8", "trainer.accelerator=auto"],
    "trainer.devices=8, but PyTorch sees no GPU here",
    "set trainer.devices=1",
)
HALF = "this CPU has no bfloat16 arithmetic: set optim.precision=32-true"
OLDER = b'{"a record": "of an older schema"}'


def assert_one_line(ended: Finished, *words: str) -> None:
    assert ended.code == 2, ended.err[-3000:]
    assert len(ended.errors) == 1 and ended.err.endswith("\n"), ended.err[-3000:]
    for text in words:
        assert text in ended.err


@of_papers("name", cases=lambda contract: [(name,) for name in [*contract.bad, "float16"]])
def test_bad_input_is_one_line_and_code_2_and_nothing_is_overwritten(contract, name, tmp_path):
    bad = contract.bad.get(name, FLOAT16)
    cfg = contract.config(tmp_path, *bad.overrides, row=bad.row)
    checkpoint = run_folder(cfg) / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    ended = call_application(contract.paper, "train", *contract.overrides(tmp_path, *bad.overrides, row=bad.row))
    assert_one_line(ended, bad.wrong, bad.remedy)
    after = {path.name: path.read_bytes() for path in run_folder(cfg).iterdir() if path.is_file()}
    assert after.pop("failed.txt").decode() == ended.err, "the failure is recorded beside the run"
    assert after.pop("last.ckpt") == b"weights" and after.pop("lock", b"") == b""
    assert set(after) <= {"train.log"} and not any(after.values()), "Hydra's log of the job says nothing else"
    assert not evidence_path(cfg).exists() and not list(tmp_path.rglob("seed*.json"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
@of_papers("application", cases=lambda contract: [("train",), ("evaluate",)])
def test_more_devices_than_are_here_is_one_line_before_anything_is_started(contract, application, tmp_path):
    line = contract.overrides(tmp_path, *DEVICES.overrides)
    assert_one_line(call_application(contract.paper, application, *line), DEVICES.wrong, DEVICES.remedy)
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("lock"))


@of_papers("application", cases=lambda contract: [("train",), ("evaluate",)])
def test_half_precision_on_a_cpu_without_it_is_one_line(contract, application, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    line = contract.overrides(tmp_path, "optim.precision=bf16-mixed")
    assert_one_line(call_application(contract.paper, application, *line), HALF)


@of_papers()
def test_a_damaged_checkpoint_or_record_is_one_line_and_stays(contract, tmp_path):
    cfg = contract.config(tmp_path)
    for checkpoint in contract.checkpoints(cfg):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(b"weights")
        ended = call_application(contract.paper, "train", *contract.overrides(tmp_path))
        assert_one_line(ended, f"{checkpoint} is damaged or no checkpoint", "move it away")
        assert checkpoint.read_bytes() == b"weights"
        checkpoint.unlink()
    record = evidence_path(cfg)
    for content, words in ((OLDER, "is not a run record"), (b'{"half', "is truncated or not JSON")):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_bytes(content)
        ended = call_application(contract.paper, "train", *contract.overrides(tmp_path))
        assert_one_line(ended, f"{record} {words}", "delete it and run the row again")
        assert record.read_bytes() == content


@of_papers()
def test_the_command_line_names_an_unknown_row_key_and_scale_and_writes_nothing(contract, tmp_path, capsys):
    where = ["--root", str(contract.paper.root), "--results", str(tmp_path)]
    misspelt, meant = contract.misspelt
    for arguments, words in (
        (["--rows", misspelt], f"unknown row '{misspelt}'"),
        (["--rows", misspelt], meant),
        (["--rows", contract.row, f"{contract.unknown_keys[0]}=3"], contract.unknown_keys[0].split(".")[-1]),
        (["--rows", contract.row, "--scale", "lite"], "belongs to scale demo"),
    ):
        assert main(["reproduce", contract.paper.name, *where, *arguments]) == 2
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def evaluate(contract, tmp_path, *overrides: str) -> Finished:
    return call_application(contract.paper, "evaluate", *contract.overrides(tmp_path, *overrides))


@of_papers("name", cases=lambda contract: [(name,) for name in [*contract.bad_evaluation, "float16"]])
def test_an_evaluation_that_cannot_be_is_one_line(contract, name, tmp_path):
    bad = contract.bad_evaluation.get(name, FLOAT16)
    (tmp_path / "some.ckpt").write_bytes(b"")
    ended = evaluate(contract, tmp_path, f"ckpt={tmp_path}/some.ckpt", *bad.overrides)
    assert_one_line(ended, bad.wrong, bad.remedy)


@of_papers()
def test_an_evaluation_scores_what_was_trained_and_says_what_a_wrong_checkpoint_is(contract, tmp_path):
    trained = call_application(contract.paper, "train", *contract.overrides(tmp_path))
    assert trained.code == 0, trained.err
    cfg = contract.config(tmp_path)
    whole = contract.checkpoints(cfg)[-1]
    out = tmp_path / "out"
    (tmp_path / "half.ckpt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    for path, words in (
        ("half.ckpt", "is damaged or no checkpoint"),
        ("foreign.ckpt", "is no checkpoint of a run"),
        ("missing.ckpt", "is missing: train it with `make reproduce-"),
        ("", "is not a file: name a checkpoint in it"),
    ):
        ended = evaluate(contract, tmp_path, f"ckpt={tmp_path / path}", f"out={out}")
        assert_one_line(ended, f"{tmp_path / path} {words}")
    if contract.unfit:
        # The first: opera's classifier of a task fits whatever its backbone was pre-trained with.
        first = contract.checkpoints(cfg)[0]
        ended = evaluate(contract, tmp_path, f"ckpt={first}", f"out={out}", *contract.unfit)
        assert_one_line(ended, f"{first} does not fit row {contract.row}")
    assert not out.exists()
    ended = evaluate(contract, tmp_path, f"ckpt={whole}", f"out={out}", *contract.draw)
    assert ended.code == 0 and not ended.err, ended.err
    measured = json.loads(evidence_path(cfg).read_text())["metrics"]
    for name in contract.scores:
        assert f"{measured[name] * 100:.2f}" in ended.out, name
    assert f"checkpoint: {whole}" in ended.out
    assert all((out / name).is_file() for name in contract.pictures)
    if contract.pictures:
        again = evaluate(contract, tmp_path, f"ckpt={whole}", f"out={out}")
        assert_one_line(again, f"{out} already exists and is not empty", "give a new folder with OUT=")
