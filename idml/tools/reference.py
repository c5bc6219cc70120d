"""The scores in loops, as evaluation code commonly has them: one query, one class, one cluster after another.

Written from the definitions in retrieval.py and clustering.py, with which it shares no code: tests and the benchmark
compare the two.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


def recall(neighbours: np.ndarray, labels: np.ndarray, k: int, queries: Iterable[int]) -> float:
    """Return the fraction of queries with a sample of their class among the k nearest, from neighbours (n, m)."""
    sizes = Counter(labels.tolist())
    hits = total = 0
    for query in queries:
        if sizes[labels[query]] < 2:
            continue
        total += 1
        if labels[query] in labels[neighbours[query, :k]]:
            hits += 1
    return hits / total


def precision_scores(neighbours: np.ndarray, labels: np.ndarray, queries: Iterable[int]) -> tuple[float, float]:
    """Return R-precision and MAP@R, means over the queries that are not alone in their class."""
    precisions, averages = [], []
    for query in queries:
        same_class = labels == labels[query]  # (n,)
        relevant = int(same_class.sum()) - 1
        if relevant == 0:
            continue
        hits, average = 0, 0.0
        for place, neighbour in enumerate(neighbours[query, :relevant], 1):
            if same_class[neighbour]:
                hits += 1
                average += hits / place
        precisions.append(hits / relevant)
        averages.append(average / relevant)
    return math.fsum(precisions) / len(precisions), math.fsum(averages) / len(averages)


def retrieval_metrics(neighbours: np.ndarray, labels: np.ndarray, ks: Sequence[int], queries=None) -> dict[str, float]:
    """Return recall@k, ``rp`` and ``map@r`` from neighbours (n, m) and labels (n,), for all or some queries."""
    queries = range(len(labels)) if queries is None else queries
    metrics = {f"recall@{k}": recall(neighbours, labels, k, queries) for k in ks}
    metrics["rp"], metrics["map@r"] = precision_scores(neighbours, labels, queries)
    return metrics


def f1(labels: np.ndarray, assignment: np.ndarray) -> float:
    """Return the F1 of pairs, class by class and cluster by cluster."""
    both = same_class = same_cluster = 0
    for label in np.unique(labels):
        members = assignment[labels == label]
        same_class += len(members) * (len(members) - 1) // 2
        for cluster in np.unique(members):
            together = int((members == cluster).sum())
            both += together * (together - 1) // 2
    for cluster in np.unique(assignment):
        size = int((assignment == cluster).sum())
        same_cluster += size * (size - 1) // 2
    precision = both / same_cluster if same_cluster else 0.0
    recall = both / same_class if same_class else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def nmi(labels: np.ndarray, assignment: np.ndarray) -> float:
    """Return mutual information over the arithmetic mean of the entropies, class by class and cluster by cluster."""
    n = len(labels)
    sizes = {cluster: int((assignment == cluster).sum()) for cluster in np.unique(assignment)}
    cluster_entropy = -math.fsum(size / n * math.log(size / n) for size in sizes.values())
    class_terms, shared_terms = [], []
    for label in np.unique(labels):
        members = assignment[labels == label]
        fraction = len(members) / n
        class_terms.append(-fraction * math.log(fraction))
        for cluster in np.unique(members):
            together = int((members == cluster).sum())
            shared_terms.append(together / n * math.log(together * n / (len(members) * sizes[cluster])))
    mean_entropy = (math.fsum(class_terms) + cluster_entropy) / 2
    return math.fsum(shared_terms) / mean_entropy if mean_entropy else 1.0


def clustering_scores(labels: np.ndarray, assignment: np.ndarray) -> dict[str, float]:
    """Return ``nmi`` and ``f1`` of clusters (n,) against labels (n,)."""
    return {"nmi": nmi(labels, assignment), "f1": f1(labels, assignment)}
