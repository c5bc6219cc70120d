"""Scores agree with their definitions and with torchmetrics."""

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from shared.metrics.scores import top_hits, top_scores

FLOAT32 = 1e-6  # torchmetrics computes in float32


def test_top_hits_are_the_true_class_among_the_k_largest_in_their_order():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    hits = top_hits(logits, torch.tensor([1, 0, 1]))
    expected = [[False, True, False], [False, False, True], [True, False, False]]
    assert hits.tolist() == expected  # of three classes the five largest are three
    assert top_hits(logits, torch.tensor([1, 0, 1]), 2).tolist() == [row[:2] for row in expected]
    assert top_scores(hits) == {"top1": pytest.approx(1 / 3), "top5": 1.0}


def test_top_scores_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 10, generator=generator)
    labels = torch.randint(10, (200,), generator=generator)
    scores = top_scores(top_hits(logits, labels))
    for name, k in (("top1", 1), ("top5", 5)):
        theirs = multiclass_accuracy(logits, labels, 10, average="micro", top_k=k)
        assert scores[name] == pytest.approx(float(theirs), abs=FLOAT32)
