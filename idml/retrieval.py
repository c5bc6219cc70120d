"""Scores of retrieval from the neighbours alone: recall@k by the hit rate, R-precision, MAP@R.

Recall@k is the one that metric learning reports (Jegou et al. 2011): the fraction of queries with at least one sample
of their class among the k nearest. It is not the recall of information retrieval, the fraction of a class that is
retrieved. R-precision and MAP@R are those of Musgrave et al. 2020, "A Metric Learning Reality Check" (arXiv
2003.08505). With R the number of other samples of the query's class:

    R-precision = (same class among the R nearest) / R
    MAP@R       = 1/R sum over i = 1..R of P(i), the precision of the i nearest if the i-th is of the class, else 0

R@k always looks at k neighbours; the authors' release searched about 12 for R@100 on SOP.
"""

from collections.abc import Sequence

import torch

from shared.errors import UserError

CHUNK = 2**18  # neighbours scored at once, few enough for a core's cache


def neighbours_needed(labels, ks: Sequence[int]) -> int:
    """Return how many neighbours of every sample the scores look at, for labels (n,) and the k of recall@k."""
    labels = torch.as_tensor(labels)
    if not ks or min(ks) < 1:
        raise ValueError(f"recall@k needs whole k of at least 1, not {list(ks)}")
    largest = int(torch.unique(labels, return_counts=True)[1].max())
    return min(len(labels) - 1, max(*ks, largest - 1))


def retrieval_metrics(
    neighbours: torch.Tensor, labels, ks: Sequence[int], queries: torch.Tensor | None = None
) -> dict[str, float | int]:
    """Return recall@k by the hit rate for every k, ``rp`` and ``map@r``, fractions in [0, 1], means over queries.

    ``neighbours``: int64 (n, m), the m nearest other samples of every sample, nearest first; ``labels``: (n,);
    ``queries``: where only some samples ask, their indices (q,), and ``neighbours`` is (q, m). A sample that is alone
    in its class has nothing to find: it is left out of every score and counted under ``singletons``; ``queries`` counts
    the others. A k above n - 1 looks at all n - 1 others. Raises UserError where m is below ``neighbours_needed``
    and where every query is alone in its class.
    """
    labels = torch.as_tensor(labels).to(neighbours.device)
    queries = torch.arange(len(labels)) if queries is None else queries
    queries = queries.to(labels.device)
    _check(neighbours, labels, ks, len(queries))
    _, classes, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    relevant = sizes[classes[queries]] - 1
    asking = relevant > 0
    if not asking.any():
        raise UserError("no query has another sample of its class: give classes of two or more")
    if not asking.all():
        neighbours, queries, relevant = neighbours[asking], queries[asking], relevant[asking]
    rows = max(1, CHUNK // neighbours.shape[1])
    parts = zip(neighbours.split(rows), queries.split(rows), relevant.split(rows), strict=True)
    scores = [_scores(classes[near] == classes[asked][:, None], wanted) for near, asked, wanted in parts]
    first_hit, precision, average_precision = (torch.cat(column) for column in zip(*scores, strict=True))
    metrics = {f"recall@{k}": float((first_hit < k).double().mean()) for k in ks}
    metrics |= {"rp": float(precision.mean()), "map@r": float(average_precision.mean())}
    return metrics | {"queries": len(queries), "singletons": len(asking) - len(queries)}


def _check(neighbours: torch.Tensor, labels: torch.Tensor, ks: Sequence[int], asked: int) -> None:
    if neighbours.ndim != 2 or len(neighbours) != asked or labels.ndim != 1:
        shapes = f"neighbours {tuple(neighbours.shape)}, labels {tuple(labels.shape)}, {asked} queries"
        raise ValueError(f"one row of neighbours a query and one label a sample are needed: {shapes}")
    needed, present = neighbours_needed(labels, ks), neighbours.shape[1]
    if present < needed:
        raise UserError(
            f"recall@{max(ks)} and the largest class need {needed} neighbours of every query, {present} are given: "
            "search for neighbours_needed(labels, ks)"
        )
    if neighbours.min() < 0 or neighbours.max() >= len(labels):
        raise ValueError(f"neighbours must be indices of the {len(labels)} samples")


def _scores(hit: torch.Tensor, relevant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, from hits (q, m) and R (q,), the place of the first hit (m or more: none), R-precision and AP@R."""
    first = torch.where(hit.any(1), hit.to(torch.uint8).argmax(1), torch.iinfo(torch.int64).max)
    place = torch.arange(1, int(relevant.max()) + 1, device=hit.device)
    within = hit[:, : len(place)] & (place <= relevant[:, None])  # (q, largest R)
    hits_so_far = within.cumsum(1)
    average_precision = (within * hits_so_far / place.double()).sum(1) / relevant
    return first, hits_so_far[:, -1].double() / relevant, average_precision
