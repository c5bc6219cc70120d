r"""PDML's idea: a pixel is a distribution, and pixels are compared by a metric between distributions.

arXiv 2211.08349, abstract: every pixel of a patch gets a global probabilistic distribution and a probabilistic
metric measures the distance between distributions. The abstract names neither the family nor the metric; the
Gaussian with diagonal covariance and the five metrics below are our interpretation (INTERPRETATIONS.md).

A distribution is a pair (mean, variance), each (N, D). Every function returns all pairs, (N, M), of
N(a, diag s) and N(b, diag t), written per dimension and summed over the D dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOG_VARIANCE_LOW, LOG_VARIANCE_HIGH = -6.0, 3.0


class GaussianHeads(nn.Module):
    """Two heads that turn the feature of every pixel into a Gaussian with diagonal covariance.

    features (B, F, p, p) -> mean and log-variance, each (B, D, p, p); the log-variance lies in [-6, 3].
    """

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.mean = nn.Conv2d(in_features, width, 1)
        self.log_variance = nn.Conv2d(in_features, width, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        # A sigmoid, not a clamp: a clamp has no gradient at its bounds, where a variance would stay.
        span = LOG_VARIANCE_HIGH - LOG_VARIANCE_LOW
        return self.mean(features), LOG_VARIANCE_LOW + span * torch.sigmoid(self.log_variance(features))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_i - b_j|^2, (N, M), through one matrix product."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    return (squares - 2 * a @ b.T).clamp_min(0)


def expected_squared_distance(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    r"""E |x - y|^2 for independent x, y: \sum (a - b)^2 + s + t."""
    return _squared_distances(a, b) + s.sum(1)[:, None] + t.sum(1)[None, :]


def wasserstein(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    r"""Squared 2-Wasserstein distance: \sum (a - b)^2 + (\sqrt s - \sqrt t)^2."""
    return _squared_distances(torch.cat([a, s.sqrt()], 1), torch.cat([b, t.sqrt()], 1))


def mutual_likelihood_score(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    r"""log \int p(z) q(z) dz = -1/2 \sum [(a - b)^2 / (s + t) + log(s + t) + log 2 pi]; a similarity.

    The name is that of Shi and Jain, Probabilistic Face Embeddings, ICCV 2019, eq. 3.
    """
    total = s[:, None] + t[None]  # (N, M, D)
    terms = (a[:, None] - b[None]).square() / total + total.log()
    return -0.5 * terms.sum(2) - 0.5 * a.shape[1] * math.log(2 * math.pi)


def bhattacharyya(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    r"""-log \int \sqrt{p q} = \sum (a - b)^2 / (4 (s + t)) + 1/2 log((s + t) / (2 \sqrt{s t}))."""
    total = s[:, None] + t[None]
    terms = (a[:, None] - b[None]).square() / (4 * total) + 0.5 * (total / 2).log()
    return terms.sum(2) - 0.25 * (s.log().sum(1)[:, None] + t.log().sum(1)[None, :])


def symmetric_kl(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    r"""(KL(p|q) + KL(q|p)) / 2 = 1/4 \sum [s / t + t / s - 2 + (a - b)^2 (1 / s + 1 / t)]."""
    mean_part = (a[:, None] - b[None]).square() * (1 / s[:, None] + 1 / t[None])
    ratios = s @ (1 / t).T + (1 / s) @ t.T - 2 * a.shape[1]
    return 0.25 * (mean_part.sum(2) + ratios)


@dataclass(frozen=True)
class Metric:
    """A metric between Gaussians and whether it is a similarity (larger = closer)."""

    pairs: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    is_inverted: bool = False


METRICS = {
    "expected_squared_distance": Metric(expected_squared_distance),
    "wasserstein": Metric(wasserstein),
    "mutual_likelihood": Metric(mutual_likelihood_score, is_inverted=True),
    "bhattacharyya": Metric(bhattacharyya),
    "symmetric_kl": Metric(symmetric_kl),
}


def fuse(weighted_mean: Tensor, precision: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a pixel, each (N, D), from sums over the patches that cover it.

    ``weighted_mean`` = sum of mean_k / variance_k, ``precision`` = sum of 1 / variance_k, each (N, D);
    ``count`` (N, 1) = how many patches. The variance is the harmonic mean, not 1 / precision: overlapping
    patches are not independent looks at the pixel, and one look is what classes are compared with.
    """
    return weighted_mean / precision, count / precision
