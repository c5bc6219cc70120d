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


def test_several_processes_get_the_rows_that_start_so_and_the_worst_code_comes_back(tmp_path, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command, cwd):
            commands.append(command)
            self.code = len(commands) % 2

        def wait(self):
            return self.code

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert gpu.train_rows("pdml", ("jasper-random",), tmp_path, 3) == 1
    assert len(commands) == 3 and commands[0] == commands[2]
    rows = commands[0][commands[0].index("--rows") + 1].split(",")
    assert len(rows) > 1 and all(row.startswith("jasper-random") for row in rows)
    assert commands[0][-1] == str(tmp_path)
