"""What IDML trains on a batch: a metric loss on the images, and on their mixtures.

    x~ = lam x + (1 - lam) x',      lam ~ Beta(alpha, alpha), one for the batch
    L  = L(x, y)  [ + lam L(x~, y) + (1 - lam) L(x~, y') ]

A mixture is both classes at once. A loss pulls it to the one and to the other; it cannot be at both, but with the
introspective metric it can say that it is not sure, which brings it near to both (the authors' words, issue 2 of their
release). A baseline without the metric may train on mixtures as well: the control of what mixing alone gives.
"""

from collections.abc import Callable

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from shared.data.keyed import keyed_uniform, stream
from shared.training.ranks import gather_rows, rank, rows_of_ranks, world_size

LAMBDA = stream("idml.lambda")


def mixup_lambda(seed: int, step: int, alpha: float) -> float:
    """Return lam, the weight of the first image in every mixture of a step, in [0, 1]."""
    return float(betaincinv(alpha, alpha, float(keyed_uniform(LAMBDA, seed, step))))


def mixup_pairs(rows: Tensor) -> Tensor:
    """Return the second of every pair, (B, ...) in the order of the first, the same for any number of ranks.

    The batch of all ranks is in random order and is rolled by half; the release permutes it. Where it is a multiple of
    twice the ranks, the two of a pair are on one rank; otherwise every rank is sent the rows of all.
    """
    size = sum(rows_of_ranks(len(rows), rows.device))
    if size % (2 * world_size()) == 0:
        return rows.roll(len(rows) // 2, 0)
    return gather_batch(rows).roll(size // 2, 0)[rank() :: world_size()]


def mixture(images: Tensor, lam: float) -> Tensor:
    """Return lam x + (1 - lam) x', (B, 3, H, W)."""
    return torch.lerp(mixup_pairs(images), images, lam)


def gather_batch(rows: Tensor) -> Tensor:
    """Return the rows of all ranks in the order of the whole batch, differentiably.

    Rank r has elements r, r + ranks, ... of it (``KeyedBatchSampler``); a draw of the miner must not depend on that.
    """
    gathered, ranks = gather_rows(rows), world_size()
    if ranks == 1:
        return gathered
    places = torch.cat([torch.arange(first, len(gathered), ranks) for first in range(ranks)])
    return gathered[places.argsort().to(gathered.device)]


def objective(
    network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, lam: float | None
) -> Tensor:
    """Return L, 0-d, of this rank's images (B, 3, H, W) and labels (B,) int64; the loss sees those of all ranks.

    ``lam``: as above; None trains on the images alone.
    """
    every_label = gather_batch(labels)
    total = loss(gather_batch(network(images)), every_label)
    if lam is None:
        return total
    mixed = gather_batch(network(mixture(images, lam)))
    first = loss(mixed, every_label)
    second = loss(mixed, gather_batch(mixup_pairs(labels)))
    return total + lam * first + (1 - lam) * second
