"""The measuring script of GPUs, as far as a machine without one can tell."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.bench.gpu import train_rows
from v2m.kernels.scan2d import scan2d
from v2m.mixer import ReleasedMixer
from v2m.tools import gpu_evidence, scan_evidence
from v2m.tools.released_composition import released_composition

ROOT = Path(__file__).resolve().parents[2]
SAME = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums in another order


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
    text = (tmp_path / "scan2d.json").read_text()
    assert '"green": false' in text and "milliseconds" not in text


class Peer:
    """Stands in for mamba-ssm's extension: takes what that takes, looks at the shapes, computes by our definition."""

    @staticmethod
    def scan(u, delta, A, B, C, bias):
        """Sequences (M, D, L) as grids of one row."""
        rows = (tensor[:, None, :, None].float() for tensor in (u, delta))
        matrices = (matrix[None] if matrix.dim() == 2 else matrix[:, :, :, None].float() for matrix in (B, C))
        options = {"delta_bias": bias[None], "delta_softplus": True, "backend": "reference"}
        return scan2d(*rows, A[None], *matrices, directions=("right",), **options)[:, 0, :, 0].to(u.dtype)

    @staticmethod
    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert u.shape == delta.shape and u.shape[1] == len(A) == len(delta_bias) and delta_softplus
        assert D is None and z is None
        for matrix in (B, C):
            assert matrix.shape in (A.shape, (len(u), 1, A.shape[1], u.shape[2]))
        assert all(t.is_contiguous() for t in (u, delta, A, B, C, delta_bias))
        return Peer.scan(u, delta, A, B, C, delta_bias), torch.zeros(1)

    @staticmethod
    def bwd(u, delta, A, B, C, D, z, bias, dout, states, out, dz, delta_softplus, recompute):
        assert dout.shape == u.shape and dout.is_contiguous() and out is None and dz is None
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, bias)]
            gradients = torch.autograd.grad(Peer.scan(*leaves), leaves, dout)
        return *gradients[:5], None, gradients[5]


def test_the_release_on_the_peers_scan_computes_what_it_computes_on_ours():
    torch.manual_seed(0)
    mixer = ReleasedMixer(8, state_dim=4)
    grid = torch.randn(2, 3, 3, 8, requires_grad=True)
    leaves = [grid, *mixer.parameters()]
    ours = released_composition(mixer, grid)
    theirs = released_composition(mixer, grid, gpu_evidence.peer_pass(Peer))
    torch.testing.assert_close(theirs, ours, **SAME)
    for got, want in zip(*(torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (theirs, ours)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_peer_is_given_the_lines_of_the_grid():
    arguments = {
        "u": torch.randn(2, 4, 6, 3, 5),
        "delta": torch.randn(2, 4, 6, 3, 5),
        "C": torch.randn(2, 4, 2, 3, 5),
        "A": -torch.rand(1, 6, 2).expand(4, 6, 2),
        "delta_bias": torch.randn(1, 6).expand(4, 6),
    }
    u, delta, A, B, C, _, _, bias = gpu_evidence.peer_arguments(arguments, columns=True)
    y = Peer.scan(u, delta, A, B, C, bias)  # (4 x 2 x 5, 6, 3)
    expected = scan2d(**arguments, directions=("down",) * 4, delta_softplus=True, backend="reference")
    torch.testing.assert_close(y, gpu_evidence.sequences(expected, True), **SAME)


def rehearse(out: str) -> None:
    """Run the script with Triton's interpreter in the GPU's place; to be called under TRITON_INTERPRET=1."""

    def called(calls):
        for call in calls.values():
            call()
        return {name: {"median": 4.0**i, "least": 1.0, "largest": 99.0} for i, name in enumerate(calls)}

    few = [
        gpu_evidence.case(2, 3, 2, torch.float32, ("right", "up"), "rows", 4),
        gpu_evidence.case(1, 4, 2, torch.float32, ("left",), "both", 4),
        gpu_evidence.case(1, 2, 2, torch.float32, ("left", "down"), "both", 4, shared=True),
    ]
    changes = {"DEVICE": "cpu", "require_triton": lambda: None, "milliseconds": called, "CHECKED": few, "AS_TIMED": []}
    changes |= {"mamba_ssm_or_reason": lambda source: Peer, "MIXER": (1, 4, 2)}
    changes["SHAPES"] = {
        name: (1, 4, 2 if shape[2] > 1 else 1, 3, 2, shape[5], shape[6]) for name, shape in gpu_evidence.SHAPES.items()
    }
    for name, value in changes.items():
        setattr(gpu_evidence, name, value)
    scan_evidence.CHECKERS = 1
    raise SystemExit(gpu_evidence.main(["--out", out]))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")
def test_the_whole_script_runs_in_tritons_interpreter_and_holds_the_bars_against_the_peer(tmp_path):
    code = f"from v2m.tests import test_gpu_evidence as test; test.rehearse({str(tmp_path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "scan2d.json").read_text())
    assert set(figures["milliseconds"]) == set(gpu_evidence.SHAPES) and len(figures["checks"]) == 3
    # The stand-in for a clock gave 1, 4 and 16 ms to ours and the others.
    ratios = {row["bar"]: (row["measured"], row["holds"]) for row in figures["bars"]}
    assert ratios["V2M-S, rows, forward: times mamba-ssm"] == (4.0, False)
    assert ratios["mixer: times release's composition, mamba-ssm"] == (16.0, True)
    assert len(ratios) == 2 * 2 + 1
    assert "checks hold" in done.stdout and "missed" in done.stdout


def test_trainings_are_the_lite_rows_for_a_gpu_and_a_failed_one_shows(monkeypatch, tmp_path):
    rows = set()

    def run(command, cwd, env):
        rows.add(command[-1].removeprefix("+experiment="))
        return subprocess.CompletedProcess(command, int(len(rows) > 1))

    monkeypatch.setattr(subprocess, "run", run)
    assert train_rows("v2m", gpu_evidence.GPU_ROWS, tmp_path, 2) == 1
    assert {"v2m-cifar10-all-vim", "cifar10-all-v2m", "tiny32-v2m-released", "imagenette-v2m-corners1"} <= rows
    assert not {"v2m-cifar10-vim", "cifar10-v2m"} & rows
