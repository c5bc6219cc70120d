"""The GPU script's parts on the CPU: its checks hold and can be red, and nothing is timed behind a red one."""

import json

import pytest
import torch

from opera.hierarchy import ARRANGEMENTS
from opera.masked import MASKED_ARRANGEMENTS
from opera.tools import gpu_evidence

TOY = {"toy": (["data=cifar10-jpg", "model=resnet-small", "heads=small", "views=small", "optim=small-resnet"], 8)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_sentence_and_code_2(tmp_path, capsys):
    assert gpu_evidence.main(["--out", str(tmp_path / "figures")]) == 2
    assert capsys.readouterr().err.strip() == ("error: no GPU is visible to PyTorch: run this on a machine with one")
    assert not (tmp_path / "figures").exists()


def test_a_red_check_is_reported_and_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "require_gpu", lambda: None)
    monkeypatch.setattr(gpu_evidence, "check_views", lambda name: {"what": name, "green": True})
    monkeypatch.setattr(gpu_evidence, "check_objective", lambda name: {"what": name, "green": name != "parallel"})
    monkeypatch.setattr(gpu_evidence, "timed", lambda name: pytest.fail("timed behind a red check"))
    assert gpu_evidence.main(["--out", str(tmp_path)]) == 1
    assert "steps" not in json.loads((tmp_path / "opera.json").read_text())


@pytest.mark.parametrize("arrangement", [*ARRANGEMENTS, *MASKED_ARRANGEMENTS])
def test_every_objective_is_checked_and_float32_is_near_enough(arrangement, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "DEVICE", "cpu")
    actual = gpu_evidence.check_objective(arrangement)
    assert actual["green"] and 0 < actual["error"]


def test_a_wrong_objective_or_view_is_red(monkeypatch):
    monkeypatch.setattr(gpu_evidence, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_evidence, "STEPS", TOY)
    assert gpu_evidence.check_views("toy")["green"]
    right, views = gpu_evidence.outcome, gpu_evidence.PretrainingModule.both_views
    calls = []

    def off(*arguments):
        calls.append(None)
        actual = right(*arguments)
        return {name: value * (1 + 0.01 * (len(calls) == 2)) for name, value in actual.items()}

    monkeypatch.setattr(gpu_evidence, "outcome", off)
    assert not gpu_evidence.check_objective("hierarchy")["green"]

    def moved(self, batch):
        calls.append(None)
        return [view + 0.01 * len(calls) for view in views(self, batch)]

    monkeypatch.setattr(gpu_evidence.PretrainingModule, "both_views", moved)
    assert not gpu_evidence.check_views("toy")["green"]


def test_the_whole_script_runs_on_the_cpu(tmp_path, monkeypatch, capsys):
    def called(calls, *options):
        for call in calls.values():
            call()
        return {name: {"median": 2.0 if name == "ours" else 4.0, "least": 1.0, "largest": 9.0} for name in calls}

    changes = {"DEVICE": "cpu", "STEPS": TOY, "CHECKED": 4, "require_gpu": lambda: None, "milliseconds": called}
    for name, value in changes.items():
        monkeypatch.setattr(gpu_evidence, name, value)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(gpu_evidence, "check_objective", lambda name: {"what": name, "green": True})
    assert gpu_evidence.main(["--out", str(tmp_path)]) == 0
    actual = json.loads((tmp_path / "opera.json").read_text())
    assert actual["steps"]["toy"]["times_reference"] == 2.0 and actual["steps"]["toy"]["holds"]
    assert "holds" in capsys.readouterr().out
