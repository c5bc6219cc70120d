"""`python -m pdml.evaluate`: the scores of the run itself, and one sentence for a checkpoint that is not its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdml.evaluate import evaluate_checkpoint
from shared.claims.compose import quoted, row_config
from shared.claims.protocol import Paper
from shared.errors import UserError
from shared.testing.applications import Finished, call_application

ROW = "synthetic-random-ssrn-plain"
# Two steps on a quarter of the scene, with a small network input.
FEW = ["scale.steps=2", "optim.batch_size=8", "patch_size=5", "components=9", "output.region=scored"]
FEW += ["data.height=24", "data.width=24", "data.split.block=10", "logger=none"]
ROOT = Path(__file__).resolve().parents[2]


def evaluate(*overrides: str) -> Finished:
    return call_application(Paper("pdml", ROOT), "evaluate", f"+experiment={ROW}", *overrides, *FEW)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of results of one run of two steps from the command line, in a process of its own."""
    folder = tmp_path_factory.mktemp("results")
    paths = [f"paths.results={folder}/pdml", f"paths.runs={folder}/pdml/runs"]
    command = [sys.executable, "-m", "pdml.train", f"+experiment={ROW}", *paths, *FEW]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder / "output").write_text(run.stdout + run.stderr)
    return folder


@pytest.fixture(scope="module")
def checkpoint(results):
    (path,) = results.rglob("last.ckpt")
    return path


def test_a_run_says_one_line(results):
    (line,) = (results / "output").read_text().splitlines()
    assert f" - {ROW} seed 0: OA % " in line and line.endswith(" s)")


def test_evaluation_gives_the_scores_of_the_run_and_leaves_its_files_alone(results, checkpoint):
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    ended = evaluate(f"paths.results={results}/pdml", f"paths.runs={results}/pdml/runs")
    assert ended.code == 0, ended.err
    measured = json.loads((results / "pdml" / "demo" / ROW / "seed0.json").read_text())["metrics"]
    assert f" {measured['oa'] * 100:.2f} " in ended.out and "2 of 2" in ended.out
    assert before == {path: path.read_bytes() for path in before}
    drawn = sorted(path.name for path in (checkpoint.parent / "evaluation-1").iterdir())
    assert drawn == ["classification.png", "confusion.png", "split.png", "uncertainty.png"]
    # Beyond the two digits that are printed, and per class: the same weights decide the same.
    again = evaluate_checkpoint(row_config("pdml", ROW, 0, [*FEW, "output.maps=false"]), checkpoint, results / "none")
    assert {
        key: again[key] for key in measured if key in again and "seconds" not in key and key != "steps_trained"
    }.items() <= measured.items()
    assert again["per_class"] == measured["per_class"] and not (results / "none").exists()


@pytest.mark.parametrize(
    "row, seed, overrides, words",
    [
        (ROW, 1, [], "was trained on other pixels .* row and the seed"),
        ("synthetic-disjoint-ssrn-plain", 0, [], "was trained on other pixels"),
        ("synthetic-random-ssrn-pdml", 0, [], "does not fit row synthetic-random-ssrn-pdml: .* give the row"),
        (ROW, 0, ["components=11"], "does not fit row"),
        (ROW, 0, ["patch_size=8"], "odd patch_size"),
    ],
)
def test_checkpoint_of_another_row_or_arrangement_is_refused(row, seed, overrides, words, checkpoint, tmp_path):
    with pytest.raises(UserError, match=words):
        evaluate_checkpoint(row_config("pdml", row, seed, [*FEW, *overrides]), checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_is_one_line_with_the_file(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"not a checkpoint\n" * 99}
    for name, part in damaged.items():
        (tmp_path / name).write_bytes(part)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign")
    torch.save({"state_dict": {}, "global_step": 0, "code": torch.nn.ReLU()}, tmp_path / "with code")
    for name in (*damaged, "foreign", "with code", "missing"):
        file, out = tmp_path / name, tmp_path / "out"
        ended = evaluate(f"ckpt={quoted(str(file))}", f"out={quoted(str(out))}")
        assert ended.code == 2 and len(ended.errors) == 1, name
        assert str(file) in ended.err and "train it" in ended.err, name
        assert not out.exists()
