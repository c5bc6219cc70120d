"""The measuring script of GPUs, rehearsed on the CPU in the GPU's place."""

import json
import subprocess

import pytest
import torch

from idml.tools import gpu_evidence
from shared.bench.gpu import train_rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which would be measured")
def test_without_a_gpu_it_says_so_in_one_sentence_and_writes_nothing(tmp_path, capsys):
    assert gpu_evidence.main(["--out", str(tmp_path / "figures")]) == 2
    assert capsys.readouterr().err.strip() == ("error: no GPU is visible to PyTorch: run this on a machine with one")
    assert not (tmp_path / "figures").exists()


def test_a_red_check_is_reported_and_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "require_gpu", lambda: None)
    monkeypatch.setattr(gpu_evidence, "check_loss", lambda *case: {"what": case, "green": True})
    monkeypatch.setattr(gpu_evidence, "check_neighbours", lambda: {"what": "neighbours", "green": False})
    monkeypatch.setattr(gpu_evidence, "timed_search", lambda: pytest.fail("timed behind a red check"))
    assert gpu_evidence.main(["--out", str(tmp_path)]) == 1
    actual = json.loads((tmp_path / "idml.json").read_text())
    assert len(actual["checks"]) == 2 * 7 + 1 + 1 and "milliseconds" not in actual


def test_the_whole_script_runs_on_the_cpu(tmp_path, monkeypatch, capsys):
    def called(calls, *options, **named):
        for call in calls.values():
            call()
        return {name: {"median": 1.0, "least": 1.0, "largest": 9.0} for name in calls}

    changes = {"DEVICE": "cpu", "require_gpu": lambda: None, "milliseconds": called}
    changes |= {"SAMPLES": 100, "CHECKED_SAMPLES": 100, "BATCH": 4, "SIDE": 32, "CLASSES": 2}
    for name, value in changes.items():
        monkeypatch.setattr(gpu_evidence, name, value)
    code = gpu_evidence.main(["--out", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
    assert len(json.loads((tmp_path / "idml.json").read_text())["milliseconds"]) == 4


def test_a_wrong_loss_is_seen(monkeypatch):
    monkeypatch.setattr(gpu_evidence, "DEVICE", "cpu")
    right = gpu_evidence.outcome

    def off(loss, embeddings, labels):
        actual = right(loss, embeddings, labels)
        return {name: value * (1.001 if value.dtype == torch.float32 else 1) for name, value in actual.items()}

    monkeypatch.setattr(gpu_evidence, "outcome", off)
    assert not gpu_evidence.check_loss("contrastive", "plain")["green"]


def test_trainings_are_the_lite_rows_of_every_loss(monkeypatch, tmp_path):
    rows = set()

    def run(command, cwd, env):
        rows.add(command[-1].removeprefix("+experiment="))
        return subprocess.CompletedProcess(command, int(len(rows) > 1))

    monkeypatch.setattr(subprocess, "run", run)
    assert train_rows("idml", gpu_evidence.GPU_ROWS, tmp_path, 2) == 1
    assert {"cub50-pa", "cars196t-idml-mdw", "cars196t-fap-mixup", "cifar10-idml-cutmix"} <= rows
    assert not [row for row in rows if row.startswith("choice")]
