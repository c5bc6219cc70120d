"""The measuring script of GPUs, as far as a machine without one can tell."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from globalmamba.tools import gpu_evidence, scan_evidence
from shared.bench.gpu import train_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, it would be measured")
def test_without_a_gpu_it_says_so_in_one_sentence_and_writes_nothing(tmp_path, capsys):
    assert gpu_evidence.main(["--out", str(tmp_path / "figures")]) == 2
    assert capsys.readouterr().err.strip() == ("error: no GPU is visible to PyTorch: run this on a machine with one")
    assert not (tmp_path / "figures").exists()


def test_a_red_check_is_reported_and_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evidence, "require_triton", lambda: None)
    monkeypatch.setattr(gpu_evidence, "CHECKED", [{"length": 1}])
    monkeypatch.setattr(gpu_evidence, "AS_TIMED", [{"length": 2}])
    monkeypatch.setattr(scan_evidence, "CHECKERS", 1)
    monkeypatch.setattr(gpu_evidence, "check", lambda length: {"length": length, "green": length == 1})
    monkeypatch.setattr(gpu_evidence, "timed", lambda *shape: pytest.fail("timed behind a red check"))
    assert gpu_evidence.main(["--out", str(tmp_path)]) == 1
    text = (tmp_path / "selective_scan.json").read_text()
    assert '"green": false' in text and "milliseconds" not in text


class Peer:
    """Stands in for mamba-ssm's extension: takes what that takes and looks at the shapes."""

    @staticmethod
    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert u.shape == delta.shape and u.shape[1] == len(A) == len(D) == len(delta_bias) and delta_softplus
        assert B.shape == C.shape == (len(u), 1, A.shape[1], u.shape[2]) and (z is None or z.shape == u.shape)
        assert all(t.is_contiguous() for t in (u, delta, A, B, C, D, delta_bias))
        return u, "states", z

    @staticmethod
    def bwd(u, delta, A, B, C, D, z, bias, dout, states, out, dz, delta_softplus, recompute):
        assert dout.shape == u.shape and states == "states" and (out is None) == (z is None)


def rehearse(out: str) -> None:
    """Run the script with Triton's interpreter in the GPU's place; to be called under TRITON_INTERPRET=1."""

    def called(calls):
        for call in calls.values():
            call()
        return {name: {"median": i + 1.0, "least": 1.0, "largest": 9.0} for i, name in enumerate(calls)}

    # The interpreter cuts off to bfloat16, where a GPU rounds: its error is twice as large.
    few = [c for c in gpu_evidence.CHECKED if c["length"] in (1, 7) and c["dtype"] is torch.float32]
    few += [gpu_evidence.case(3, 2, absent=gpu_evidence.OPTIONAL)]
    changes = {"DEVICE": "cpu", "require_triton": lambda: None, "milliseconds": called, "CHECKED": few, "AS_TIMED": []}
    changes |= {"mamba_ssm_or_reason": lambda source: Peer, "copy_bandwidth": lambda: 1e12}
    changes["SHAPES"] = {
        name: (2, 64 * directions, 5, state, directions)
        for name, (_, _, _, state, directions) in gpu_evidence.SHAPES.items()
    }
    for name, value in changes.items():
        setattr(gpu_evidence, name, value)
    scan_evidence.CHECKERS = 1
    raise SystemExit(gpu_evidence.main(["--out", out]))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")
def test_the_whole_script_runs_in_tritons_interpreter_and_holds_the_bars_against_the_peer(tmp_path):
    code = f"from globalmamba.tests import test_gpu_evidence as test; test.rehearse({str(tmp_path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "selective_scan.json").read_text())
    assert set(figures["milliseconds"]) == set(gpu_evidence.SHAPES) and len(figures["checks"]) == 5
    # The stand-in for a clock gave 1, 2 and 3 ms to the two layouts and the peer.
    ratios = {row["bar"]: (row["measured"], row["holds"]) for row in figures["bars"]}
    assert ratios["Vim-S, forward, triton, channels first: times mamba-ssm"] == (3.0, True)
    assert ratios["Vim-S, forward, triton, channels last: times mamba-ssm"] == (1.5, False)
    assert len(ratios) == 2 * 4 + 2
    assert "checks hold" in done.stdout and "missed" in done.stdout


def test_trainings_are_the_lite_rows_for_a_gpu_and_a_failed_one_shows(monkeypatch, tmp_path):
    rows = set()

    def run(command, cwd, env):
        rows.add(command[-1].removeprefix("+experiment="))
        return subprocess.CompletedProcess(command, int(len(rows) > 1))

    monkeypatch.setattr(subprocess, "run", run)
    assert train_rows("globalmamba", gpu_evidence.GPU_ROWS, tmp_path, 2) == 1
    assert {"cifar10-all-vim", "cifar10-all-gm", "tiny32-vim", "tiny32-gm-random"} <= rows
    assert not {"cifar10-vim", "imagenette-gm"} & rows
