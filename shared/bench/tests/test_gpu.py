"""What the papers' GPU scripts share, without a GPU."""

import json
import subprocess

import pytest
import torch
from rich.table import Table

from shared.bench import gpu
from shared.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_one_sentence():
    with pytest.raises(UserError, match="no GPU is visible to PyTorch: run this on"):
        gpu.require_gpu()


def test_figures_are_whole_after_every_part_and_say_where_they_are_from(tmp_path, capsys):
    path = tmp_path / "new" / "figures.json"
    figures = gpu.Figures(path)
    assert {"commit", "dirty", "versions"} <= set(json.loads(path.read_text()))
    figures.add(checks=[{"what": "sum", "green": True}, {"what": "product", "green": False}])
    figures.add(where=tmp_path)
    results = json.loads(path.read_text())
    assert results["where"] == str(tmp_path) and len(results["checks"]) == 2 and not figures.green
    assert [one.name for one in path.parent.iterdir()] == ["figures.json"]
    figures.show(Table("what"), ["a line [of text]"])
    shown = capsys.readouterr().out
    assert "1 of 2 checks hold" in shown and "red: {'what': 'product'" in shown and "[of text]" in shown


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written.*--out"):
        gpu.Figures(tmp_path / "file" / "figures.json")


def test_the_largest_error_is_one_that_is_no_number():
    assert gpu.worst_of({"a": 0.1, "b": 0.3, "c": 0.2}) == "b"
    assert gpu.worst_of({"a": 0.1, "b": float("nan"), "c": 0.2}) == "b"


@pytest.mark.parametrize(
    "green, trained, wanted", [(True, 0, 0), (False, 0, 1), (True, 1, 1), (True, None, 0), (False, None, 1)]
)
def test_the_exit_code_tells_of_red_checks_and_failed_trainings(green, trained, wanted, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "train_rows", lambda *given: seen.append(given) or trained)
    arguments = ["--out", str(tmp_path)] + ([] if trained is None else ["--data-root", str(tmp_path)])
    code = gpu.run_script("idml", "text", lambda options: options.out == tmp_path and green, ("a",), arguments, 3)
    assert code == wanted
    assert seen == ([] if trained is None else [("idml", ("a",), tmp_path, 3)])


def test_bad_input_is_one_sentence_and_code_2(capsys):
    def measure(options):
        raise UserError("a sentence")

    assert gpu.run_script("idml", "text", measure, (), [], 1) == 2
    assert capsys.readouterr().err == "error: a sentence\n"


def test_every_row_that_starts_so_is_a_process_and_the_worst_code_comes_back(tmp_path, monkeypatch):
    commands = []

    def run(command, cwd, env):
        commands.append(command)
        assert int(env["OMP_NUM_THREADS"]) >= 1
        return subprocess.CompletedProcess(command, int(command[-1] == "+experiment=jasper-random-ssrn-pdml"))

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.train_rows("pdml", ("jasper-random",), tmp_path, 3) == 1
    rows = [command[-1].removeprefix("+experiment=") for command in commands]
    assert len(rows) > 1 and len(set(rows)) == len(rows)
    assert all(row.startswith("jasper-random") for row in rows)
    assert all(f"paths.data_root='{tmp_path}'" in command for command in commands)


@pytest.mark.parametrize(("code", "wanted"), [(0, 0), (1, 1), (2, 1), (-9, 1)])
def test_a_training_that_failed_or_was_killed_is_code_1(code, wanted, tmp_path, monkeypatch):
    codes = iter([0, code] + [0] * 99)
    monkeypatch.setattr(subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, next(codes)))
    assert gpu.train_rows("pdml", ("jasper-random",), tmp_path, 1) == wanted
