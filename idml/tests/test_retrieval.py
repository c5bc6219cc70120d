"""Scores of retrieval against the loop form, the public calculator, values by hand; and what is refused."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from idml import retrieval
from idml.neighbours import nearest_neighbours
from idml.retrieval import neighbours_needed, retrieval_metrics
from idml.tools import reference
from shared.errors import UserError

EXACT = 1e-12  # sums of at most n fractions in float64


def random_case(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings around class centres and labels, names of classes far apart and negative."""
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(classes, (n,), generator=draw)
    centres = torch.randn(classes, 6, generator=draw)
    return centres[which] + torch.randn(n, 6, generator=draw), which * 1000 - 7


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(2, 80), classes=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_scores_are_those_of_the_reference(n, classes, seed):
    embeddings, labels = random_case(n, classes, seed)
    labels[-2:] = 1  # a class of two at the least; with few samples and many classes others are alone
    ks = [1, 2, 10, 200]
    neighbours = nearest_neighbours(embeddings, neighbours_needed(labels, ks))
    scores = retrieval_metrics(neighbours, labels, ks)
    expected = reference.retrieval_metrics(neighbours.numpy(), labels.numpy(), ks)
    sizes = np.unique(labels, return_counts=True)[1]
    assert scores.pop("singletons") == (sizes == 1).sum()
    assert scores.pop("queries") == n - (sizes == 1).sum()
    assert scores == pytest.approx(expected, abs=EXACT, rel=0)


@pytest.mark.parametrize("n, classes, seed", [(200, 5, 0), (300, 60, 1), (150, 140, 2)])
def test_scores_are_those_of_the_public_calculator(n, classes, seed):
    embeddings, labels = random_case(n, classes, seed)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    unit = torch.nn.functional.normalize(embeddings)
    expected = calculator.get_accuracy(unit, labels)
    scores = retrieval_metrics(nearest_neighbours(unit, neighbours_needed(labels, [1])), labels, [1])
    actual = dict(zip(names, (scores["recall@1"], scores["rp"], scores["map@r"]), strict=True))
    # one query out of n would show; the calculator computes averages in float64 and hands on what torch made of them
    assert actual == pytest.approx({name: expected[name] for name in names}, abs=1e-9, rel=0)


def test_values_worked_out_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    neighbours = torch.tensor(
        [
            [1, 3, 2],  # R 2: R-precision 1/2, AP (1/1)/2
            [3, 0, 2],  # R-precision 1/2, AP (1/2)/2
            [4, 3, 5],  # nothing
            [4, 0, 1],  # R 1: all
            [0, 1, 3],  # first hit third: counts for recall@3 alone
            [0, 1, 2],  # alone in its class: left out
        ]
    )
    scores = retrieval_metrics(neighbours, labels, [1, 2, 3])
    assert scores == {
        "recall@1": pytest.approx(2 / 5, abs=EXACT),
        "recall@2": pytest.approx(3 / 5, abs=EXACT),
        "recall@3": pytest.approx(4 / 5, abs=EXACT),
        "rp": pytest.approx((1 / 2 + 1 / 2 + 0 + 1 + 0) / 5, abs=EXACT),
        "map@r": pytest.approx((1 / 2 + 1 / 4 + 0 + 1 + 0) / 5, abs=EXACT),
        "queries": 5,
        "singletons": 1,
    }


def test_recall_looks_at_k_neighbours_not_at_the_largest_class():
    # The authors' release searches as many neighbours as the largest class has: here 2 for R@10.
    labels = torch.arange(20) // 2
    ring = (torch.arange(20)[:, None] + torch.arange(1, 20)) % 20  # a class mate is the first or the last
    scores = retrieval_metrics(ring, labels, [1, 10])
    assert (scores["recall@1"], scores["recall@10"]) == (0.5, 0.5)
    assert neighbours_needed(labels, [1, 10]) == 10
    late = ring.roll(9, 1)  # now it is the tenth or the ninth
    assert [retrieval_metrics(late, labels, [k])[f"recall@{k}"] for k in (8, 9, 10)] == [0, 0.5, 1]


def test_some_queries_among_all_are_scored_alone(monkeypatch):
    embeddings, labels = random_case(90, 8, 3)
    some = torch.tensor([80, 3, 5, 44])
    neighbours = nearest_neighbours(embeddings, neighbours_needed(labels, [1, 5]))
    scores = retrieval_metrics(neighbours[some], labels, [1, 5], some)
    expected = reference.retrieval_metrics(neighbours.numpy(), labels.numpy(), [1, 5], some.tolist())
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=EXACT, rel=0)
    assert scores["queries"] == 4
    whole = retrieval_metrics(neighbours, labels, [1, 5])
    monkeypatch.setattr(retrieval, "CHUNK", 100)
    assert retrieval_metrics(neighbours, labels, [1, 5]) == whole


def test_too_few_neighbours_are_refused_unless_there_are_no_more():
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert [neighbours_needed(labels, ks) for ks in ([1], [1, 7], [100])] == [5, 7, 9]
    neighbours = nearest_neighbours(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), 9)
    for have, ks in ((4, [1]), (6, [7]), (8, [100])):
        with pytest.raises(UserError, match=f"need {have + 1} neighbours of every query, {have} are given"):
            retrieval_metrics(neighbours[:, :have], labels, ks)
    assert retrieval_metrics(neighbours, labels, [100])["recall@100"] == 1


def test_what_cannot_be_scored_is_refused():
    neighbours = nearest_neighbours(torch.eye(4), 3)
    with pytest.raises(UserError, match="no query has another sample of its class"):
        retrieval_metrics(neighbours, torch.arange(4), [1])
    for rows, labels, ks in (
        (neighbours, torch.zeros(5), [1]),
        (neighbours[:3], torch.zeros(4), [1]),
        (neighbours - 1, torch.zeros(4), [1]),
        (neighbours + 1, torch.zeros(4), [1]),
        (neighbours, torch.zeros(4), [0]),
        (neighbours, torch.zeros(4), []),
    ):
        with pytest.raises(ValueError):
            retrieval_metrics(rows, labels, ks)


@pytest.mark.slow
def test_scores_after_the_search_are_ten_times_faster_than_the_reference():
    draw = torch.Generator().manual_seed(0)
    n = 20000
    labels = torch.randint(n // 5, (n,), generator=draw)
    neighbours, ks = torch.randint(n, (n, 100), generator=draw), [1, 10, 100]

    def seconds(call):  # of the CPU: other processes do not count
        begin = time.process_time()
        call()
        return time.process_time() - begin

    def ratio():
        loop = seconds(lambda: reference.retrieval_metrics(neighbours.numpy(), labels.numpy(), ks))
        return loop / min(seconds(lambda: retrieval_metrics(neighbours, labels, ks)) for _ in range(3))

    assert ratio() >= 10 or ratio() >= 10
