"""The metrics between distributions as a pytorch_metric_learning distance, so that its losses train with them.

distance = GaussianDistance("mutual_likelihood")
distance.calibrate(embedding)  # (N, 2D) of the first batch; without it the values are in the metric's own units
loss = losses.MultiSimilarityLoss(distance=distance)
"""

import logging

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from pdml.distributions import LOG_VARIANCE_HIGH, LOG_VARIANCE_LOW, METRICS

log = logging.getLogger(__name__)


def split_embedding(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Split (N, 2D) = [mean | log-variance] into mean and variance, each (N, D).

    The log-variance is clamped to its range, which changes only the free proxies of proxy losses.
    """
    mean, log_variance = embedding.chunk(2, dim=1)
    return mean, log_variance.clamp(LOG_VARIANCE_LOW, LOG_VARIANCE_HIGH).exp()


class GaussianDistance(BaseDistance):
    """Distance, or similarity, between embeddings (N, 2D) = [mean | log-variance] of diagonal Gaussians.

    The library's losses were made for numbers around 1: distances of unit vectors, or cosines. ``calibrate``
    reads training pairs once, and from then on a distance d becomes d / median(d); a similarity s becomes
    (s - median(s)) / (median self-similarity - median(s)), 1 for a pixel with itself and 0 for a typical pair.
    Both numbers are buffers and travel in the checkpoint.

    ``Objective`` calibrates its distance. Used alone, this one is not calibrated before ``calibrate`` is called, and
    its first use then logs a warning. Calibration is of scale alone: probabilities that a softmax makes of these
    values, as ``ClassDistributions`` does, are not calibrated as probabilities.
    """

    def __init__(self, metric: str):
        self.name, self.metric, self.used = metric, METRICS[metric], False
        super().__init__(normalize_embeddings=False, p=2, power=1, is_inverted=self.metric.is_inverted)
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    def raw(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return the metric in its own units, (N, M)."""
        return self.metric.pairs(*split_embedding(query), *split_embedding(reference))

    @torch.no_grad()
    def calibrate(self, embedding: Tensor) -> None:
        """Read offset and scale from the pairs among ``embedding`` (N, 2D), N >= 2."""
        values = self.raw(embedding, embedding)
        own = torch.eye(len(values), dtype=torch.bool, device=values.device)
        typical = values[~own].median()
        if self.is_inverted:
            self.offset.copy_(typical)
            self.scale.copy_(values[own].median() - typical)
        else:
            self.scale.copy_(typical)
        # Pixels that are all alike leave nothing to scale by.
        if not torch.isfinite(self.scale) or self.scale <= 0:
            self.scale.fill_(1.0)
        self.calibrated.fill_(True)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        # Asked once: reading a buffer waits for an accelerator.
        if not self.used and not self.calibrated:
            log.warning(
                "GaussianDistance(%r) is not calibrated: its values are in the metric's own units, and the losses' "
                "margins were made for numbers around 1; call calibrate(embedding) on a first batch",
                self.name,
            )
        self.used = True
        return (self.raw(query_emb, ref_emb) - self.offset) / self.scale

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.stack([self.compute_mat(q[None], r[None])[0, 0] for q, r in zip(query_emb, ref_emb, strict=True)])
