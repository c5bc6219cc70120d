"""Scores of clustering: k-means of embeddings at length 1, then NMI and the F1 of pairs, with their spread over seeds.

The number of clusters is the number of classes, as in the release, whose ``utils.py`` takes scikit-learn's KMeans:
k-means++, the best of 10 starts, up to 300 iterations. One start from random rows, as of most libraries that score
metric learning, gives an NMI that is points lower. NMI is mutual information over the arithmetic mean of the two
entropies. F1 is the harmonic mean of precision and recall over pairs of samples: of the pairs in one cluster the
fraction in one class, and of the pairs in one class the fraction in one cluster.
"""

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.metrics import normalized_mutual_info_score

from idml.neighbours import unit_rows
from shared.errors import UserError

try:
    import faiss
except ImportError:  # scikit-learn's k-means, slower, in its place
    faiss = None

STARTS = ("k-means++", "random")
ITERATIONS = {"k-means++": 300, "random": 20}  # of the release; of pytorch-metric-learning
RELEASED_STARTS = 10
# With more clusters one start is within 0.3 points of NMI of the best of ten (tests/test_clustering.py), which would
# take hours: CUB has 100 clusters, Cars196 98, SOP 11,316.
MANY_CLUSTERS, MANY_ITERATIONS = 1000, 20


def kmeans(embeddings: torch.Tensor, clusters: int, seed: int, start: str = "k-means++") -> np.ndarray:
    """Return the cluster of every row of embeddings (n, d) brought to length 1, int64 (n,).

    ``start``: "k-means++", as released up to MANY_CLUSTERS, above it one such start, whose iterations are faiss' where
    it is installed; or "random", one start from rows drawn by ``seed``. All rows are used in every iteration; the same
    seed, number of threads and machine give the same clusters. Raises UserError for rows without a direction, for more
    clusters than rows and for another start.
    """
    # faiss seeds from the clock where the seed is negative
    if seed < 0 or clusters < 1:
        raise ValueError(f"k-means needs a seed of 0 or more and a cluster, not {seed} and {clusters}")
    if start not in STARTS:
        raise UserError(f"evaluation.kmeans={start}: choose the start from {', '.join(STARTS)}")
    rows = unit_rows(embeddings).float().cpu().numpy()
    if clusters > len(rows):
        raise UserError(f"{len(rows)} embeddings cannot make {clusters} clusters: give more samples")
    iterations = ITERATIONS[start]
    if start == "k-means++":
        if clusters <= MANY_CLUSTERS:
            as_released = KMeans(clusters, init=start, n_init=RELEASED_STARTS, max_iter=iterations, random_state=seed)
            return as_released.fit_predict(rows).astype(np.int64)
        iterations = MANY_ITERATIONS
    if faiss is None:
        again = KMeans(clusters, init=start, n_init=1, max_iter=iterations, random_state=seed)
        return again.fit_predict(rows).astype(np.int64)
    centres = None if start == "random" else kmeans_plusplus(rows, clusters, random_state=seed)[0]
    clusterer = faiss.Kmeans(
        rows.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    clusterer.train(rows, init_centroids=centres)
    return clusterer.assign(rows)[1].astype(np.int64)


def clustering_scores(labels, assignment) -> dict[str, float]:
    """Return ``nmi`` and ``f1`` in [0, 1] of clusters (n,) against labels (n,).

    Counts of pairs are exact whole numbers. Where no two samples share a class or a cluster, both are the same
    partition and F1 is 1, as NMI is.
    """
    labels, assignment = (np.asarray(torch.as_tensor(values).cpu()) for values in (labels, assignment))
    if labels.ndim != 1 or labels.shape != assignment.shape:
        raise ValueError(f"one cluster a label is needed, not {assignment.shape} and {labels.shape}")
    _, classes, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    _, clusters, cluster_sizes = np.unique(assignment, return_inverse=True, return_counts=True)
    both = np.unique(classes.astype(np.int64) * len(cluster_sizes) + clusters, return_counts=True)[1]
    total = _pairs(class_sizes) + _pairs(cluster_sizes)
    f1 = 2 * _pairs(both) / total if total else 1.0
    return {"nmi": float(normalized_mutual_info_score(classes, clusters)), "f1": f1}


def _pairs(sizes: np.ndarray) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def clustering_metrics(
    embeddings: torch.Tensor, labels, seeds: Sequence[int], start: str = "k-means++"
) -> dict[str, float]:
    """Return the mean of NMI and F1 over k-means seeds, and their sample deviation (``nmi_std``, ``f1_std``).

    ``embeddings``: (n, d); ``labels``: (n,); as many clusters as classes; ``start`` as ``kmeans``. The deviation of one
    seed is NaN.
    """
    if not seeds:
        raise ValueError("k-means needs at least one seed")
    labels = torch.as_tensor(labels)
    clusters = len(torch.unique(labels))
    scores = [clustering_scores(labels, kmeans(embeddings, clusters, seed, start)) for seed in seeds]
    metrics = {}
    for name in ("nmi", "f1"):
        values = [score[name] for score in scores]
        metrics[name] = statistics.fmean(values)
        metrics[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else float("nan")
    return metrics
