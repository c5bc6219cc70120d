"""k-means is seeded and uses every row; NMI and F1 are those of their definitions."""

import itertools
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans

from idml import clustering
from idml.clustering import clustering_metrics, clustering_scores, kmeans
from idml.neighbours import unit_rows
from idml.tools import reference
from shared.errors import UserError

EXACT = 1e-12
NMI_EXACT = 1e-9  # entropies near 0 are differences of sums; scikit-learn's differs from a plain sum there

partitions = st.integers(2, 40).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 6), min_size=n, max_size=n)] * 2))


def f1_of_pairs(labels, assignment) -> float:
    """Count every pair of samples."""
    both = one_class = one_cluster = 0
    for i, j in itertools.combinations(range(len(labels)), 2):
        both += labels[i] == labels[j] and assignment[i] == assignment[j]
        one_class += labels[i] == labels[j]
        one_cluster += assignment[i] == assignment[j]
    if not both:
        return 1.0 if not one_class + one_cluster else 0.0
    precision, recall = both / one_cluster, both / one_class
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(partitions)
def test_scores_are_those_of_all_pairs_and_of_the_reference(both):
    labels, assignment = (np.array(values) for values in both)
    scores = clustering_scores(labels * 100 - 3, torch.from_numpy(assignment))
    assert scores["f1"] == pytest.approx(f1_of_pairs(labels, assignment), abs=EXACT, rel=0)
    expected = reference.clustering_scores(labels, assignment)
    assert scores["nmi"] == pytest.approx(expected["nmi"], abs=NMI_EXACT, rel=0)
    if scores["f1"] < 1:  # the loop form knows no partition without pairs
        assert scores["f1"] == pytest.approx(expected["f1"], abs=EXACT, rel=0)


def test_scores_at_scale_are_those_of_the_reference():
    draw = np.random.default_rng(0)
    labels = draw.integers(900, size=5000)
    assignment = np.where(draw.random(5000) < 0.6, labels, draw.integers(900, size=5000))
    assert clustering_scores(labels, assignment) == pytest.approx(
        reference.clustering_scores(labels, assignment), abs=EXACT, rel=0
    )


def test_numbers_of_pairs_beyond_32_bits_are_exact():
    labels = np.repeat([0, 1], 100_000)
    half = np.arange(200_000) % 2
    pairs, both = 100_000 * 99_999 // 2, 50_000 * 49_999 // 2
    assert clustering_scores(labels.astype(np.int32), half)["f1"] == 2 * 4 * both / (4 * pairs)


@pytest.mark.parametrize("labels, f1", [([0, 1, 2], 1.0), ([0, 0, 1], 0.0)])
def test_clusters_of_one_agree_with_classes_of_one_alone(labels, f1):
    assert clustering_scores(labels, [0, 1, 2])["f1"] == f1


def grouped(n: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows near the axes, their lengths very different, and the axis of each."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % groups
    rows = torch.eye(groups)[labels] + 0.05 * torch.randn(n, groups, generator=draw)
    return rows * 10 ** (4 * torch.rand(n, 1, generator=draw)), labels


@pytest.fixture(params=["few clusters", "many clusters", "many clusters without faiss"])
def either(request, monkeypatch):
    """Cluster as released, as where there are many clusters, and so as if faiss were not installed."""
    if request.param != "few clusters":
        monkeypatch.setattr(clustering, "MANY_CLUSTERS", 0)
    if request.param == "many clusters without faiss":
        monkeypatch.setattr(clustering, "faiss", None)
    elif request.param == "many clusters":
        pytest.importorskip("faiss")


def noisy(n: int, groups: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of 64 values around random directions, and the direction of each."""
    draw, labels = torch.Generator().manual_seed(0), torch.arange(n) % groups
    directions = torch.nn.functional.normalize(torch.randn(groups, 64, generator=draw), dim=1)
    return directions[labels] + noise * torch.randn(n, 64, generator=draw) / 8, labels


def mean_nmi(rows, labels, cluster) -> float:
    """Return the mean NMI, in points, of three seeds of a function (seed) -> clusters."""
    return 100 * statistics.fmean(clustering_scores(labels, cluster(seed))["nmi"] for seed in range(3))


def test_few_clusters_are_those_of_the_release_and_a_random_start_is_points_lower():
    rows, labels = noisy(1200, 40, 1.4)
    unit = torch.nn.functional.normalize(rows.double()).float().numpy()
    # As utils.py of the release calls it, with the defaults of its scikit-learn written out.
    expected = KMeans(40, init="k-means++", n_init=10, max_iter=300, random_state=0).fit_predict(unit)
    assert (kmeans(rows, 40, 0) == expected).all()
    nmi = mean_nmi(rows, labels, lambda seed: kmeans(rows, 40, seed))
    assert nmi - mean_nmi(rows, labels, lambda seed: kmeans(rows, 40, seed, "random")) > 1


def test_many_clusters_score_within_three_tenths_of_a_point_of_scikit_learn(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(clustering, "MANY_CLUSTERS", 599)  # the real bound takes this test a minute
    rows, labels = noisy(3000, 600, 1.0)
    expected = mean_nmi(
        rows, labels, lambda seed: KMeans(600, n_init=10, random_state=seed).fit_predict(unit_rows(rows).numpy())
    )
    assert abs(mean_nmi(rows, labels, lambda seed: kmeans(rows, 600, seed)) - expected) < 0.3
    assert expected - mean_nmi(rows, labels, lambda seed: kmeans(rows, 600, seed, "random")) > 1


def test_an_unknown_start_is_one_sentence():
    with pytest.raises(UserError, match=r"evaluation.kmeans=best: choose the start from k-means\+\+, random"):
        kmeans(torch.eye(3), 2, 0, "best")


def test_kmeans_finds_directions_whatever_the_lengths(either):
    rows, labels = grouped(90, 3)
    best = max(clustering_scores(labels, kmeans(rows, 3, seed))["nmi"] for seed in range(5))
    assert best == pytest.approx(1, abs=EXACT)


def test_a_seed_fixes_the_clusters_and_another_seed_draws_anew(either):
    rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
    first, again, other = (kmeans(rows, 20, seed) for seed in (1, 1, 2))
    assert first.dtype == np.int64 and first.shape == (500,)
    assert set(first) <= set(range(20))
    assert (first == again).all() and (first != other).any()


def test_every_row_takes_part_in_every_iteration():
    # faiss by itself takes 256 rows a cluster: 20 of these 1,000 rows would hardly move a centre drawn elsewhere.
    faiss = pytest.importorskip("faiss")
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(3))
    actual = kmeans(rows, 2, 0, "random")
    unit = torch.nn.functional.normalize(rows.double()).float().numpy()
    by_itself = faiss.Kmeans(4, 2, niter=clustering.ITERATIONS["random"], seed=0)
    by_itself.train(unit)
    assert (actual != by_itself.assign(unit)[1]).any()
    for cluster in range(2):  # a fixed point of all rows: each row is nearest to the mean of its own cluster
        inside = unit[actual == cluster].mean(0), unit[actual != cluster].mean(0)
        own, other = (((unit[actual == cluster] - mean) ** 2).sum(1) for mean in inside)
        assert (own <= other).mean() > 0.99


def test_as_many_clusters_as_rows_are_possible_and_more_are_one_sentence(either):
    rows = torch.eye(5)
    assert len(set(kmeans(rows, 5, 0))) == 5
    with pytest.raises(UserError, match="5 embeddings cannot make 6 clusters"):
        kmeans(rows, 6, 0)
    with pytest.raises(UserError, match="NaN"):
        kmeans(rows / 0, 2, 0)
    for clusters, seed in ((2, -1), (0, 0)):
        with pytest.raises(ValueError):
            kmeans(rows, clusters, seed)


def test_metrics_are_mean_and_sample_deviation_over_seeds():
    draw = torch.Generator().manual_seed(4)
    rows, labels = torch.randn(200, 6, generator=draw), torch.randint(9, (200,), generator=draw) * 5
    clusters = len(labels.unique())
    each = [clustering_scores(labels, kmeans(rows, clusters, seed)) for seed in (0, 1, 2)]
    actual = clustering_metrics(rows, labels, (0, 1, 2))
    assert set(actual) == {"nmi", "nmi_std", "f1", "f1_std"}
    for name in ("nmi", "f1"):
        values = [scores[name] for scores in each]
        assert actual[name] == pytest.approx(statistics.fmean(values), abs=EXACT)
        assert actual[f"{name}_std"] == pytest.approx(statistics.stdev(values), abs=EXACT)
        assert actual[f"{name}_std"] > 0
    assert np.isnan(clustering_metrics(rows, labels, [0])["nmi_std"])


def test_nmi_is_that_of_the_public_calculator():
    rows, labels = grouped(120, 4)
    labels = torch.where(torch.arange(120) % 5 == 0, 0, labels)
    assignment = kmeans(rows, 4, 0)
    calculator = AccuracyCalculator(
        include=("NMI",), device=torch.device("cpu"), kmeans_func=lambda query, clusters: torch.from_numpy(assignment)
    )
    expected = calculator.get_accuracy(rows, labels)["NMI"]
    assert clustering_scores(labels, assignment)["nmi"] == pytest.approx(expected, abs=EXACT)
