"""The ranks of a training share its test images, and score what one process scores."""

import json
from pathlib import Path

import pytest
import torch

from shared.dense import run
from shared.dense.scoring import gathered
from shared.dense.tests.small import STEPS, Tiny, installed, small_config
from shared.testing.gloo import on_ranks

pytestmark = [installed, pytest.mark.slow]


def score_on_rank(rank: int, kind: str, folder: str) -> dict[str, float]:
    """Return the scores of an untrained network as one of several ranks, or alone."""
    torch.set_num_threads(1)
    cfg = small_config(kind, Path(folder))
    module, _ = run.prepare(cfg, Tiny())
    return run.scores_of(cfg, module.model, torch.device("cpu"), Path(folder) / "row")


@pytest.mark.parametrize("kind", STEPS)
def test_three_ranks_score_what_one_process_does(kind, tmp_path):
    alone = score_on_rank(0, kind, str(tmp_path / "alone"))
    first, *others = on_ranks(3, score_on_rank, tmp_path, kind, str(tmp_path / "together"))
    assert first == alone and alone["n_test"] == 16
    if kind == "detection":
        assert others == [{}, {}]
        boxes = [
            json.loads((tmp_path / of / "row" / "predictions.bbox.json").read_text())
            for of in ("alone", "together")
            for name in ("alone", "together")
        ]
        assert boxes[0] == boxes[1] and len(boxes[0]) > 0
    else:
        assert others == [alone, alone]


def gather_on_rank(rank: int, images: int) -> list[int]:
    return gathered(list(range(rank, images, 3)))


@pytest.mark.parametrize("images", [7, 9])
def test_what_ranks_found_is_in_the_order_of_the_images(images, tmp_path):
    assert on_ranks(3, gather_on_rank, tmp_path, images) == [list(range(images))] * 3
