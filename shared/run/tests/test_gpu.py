"""What the papers' GPU scripts share, without a GPU."""

import json
import subprocess

import pytest
import torch

from shared.errors import UserError
from shared.run import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_one_sentence():
    with pytest.raises(UserError, match="no GPU is visible to PyTorch: run this on"):
        gpu.require_gpu()


def test_figures_are_whole_or_not_there(tmp_path):
    path = tmp_path / "figures.json"
    gpu.write_figures({"a": 1.5, "where": tmp_path}, path)
    assert json.loads(path.read_text()) == {"a": 1.5, "where": str(tmp_path)}
    assert [one.name for one in tmp_path.iterdir()] == ["figures.json"]


def test_every_row_that_starts_so_is_a_process_and_the_worst_code_comes_back(tmp_path, monkeypatch):
    commands = []

    def run(command, cwd, env):
        commands.append(command)
        assert int(env["OMP_NUM_THREADS"]) >= 1
        return subprocess.CompletedProcess(command, int(command[-1] == "jasper-random-ssrn-pdml"))

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.train_rows("pdml", ("jasper-random",), tmp_path, 3) == 1
    rows = [command[command.index("--rows") + 1] for command in commands]
    assert len(rows) > 1 and len(set(rows)) == len(rows)
    assert all(row.startswith("jasper-random") for row in rows)
    assert all(str(tmp_path) in command for command in commands)


def filled(size: int) -> dict:
    return {"size": size, "green": bool(torch.empty(size).isnan().all())}


@pytest.mark.parametrize("processes", [1, 2])
def test_checks_keep_their_order_and_see_nan_in_fresh_memory(processes, monkeypatch):
    monkeypatch.setattr(gpu, "CHECKERS", processes)
    found = gpu.checks_of(filled, [{"size": size} for size in (3, 1, 2)])
    assert found == [{"size": size, "green": True} for size in (3, 1, 2)]
    assert not torch.are_deterministic_algorithms_enabled()
