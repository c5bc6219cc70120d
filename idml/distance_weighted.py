"""Distance-weighted sampling of negatives (Wu et al., Sampling Matters in Deep Embedding Learning, arXiv 1706.07567).

On the unit sphere of dimension n the distances of random points have the density q(d) ~ d^(n-2) (1 - d^2/4)^((n-3)/2),
nearly all of it at sqrt(2). Drawing negatives with weight 1 / q gives them every distance alike. A sampler of our own,
because that of pytorch-metric-learning counts the whole row, [semantic | uncertainty], as n, draws from torch's global
generator and leaves out anchors by chance: in this one n is the width of the semantic part, and a draw is a function
of the step.
"""

import torch
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

FARTHEST = 2 - 1e-4  # of a distance under the logarithm, which is infinite at 2


class DistanceWeightedSampler(BaseMiner):
    """For every pair of an anchor and another sample of its class, one negative of the anchor: indices (a, p, n).

    ``cutoff``: smaller distances count as this one; ``farthest``: negatives beyond it are not drawn, since the margin
    loss has no gradient there. An anchor all of whose negatives are farther draws from all of them alike.
    ``distance``: the one of the loss. Draws come from a generator that ``seed_step`` seeds.
    """

    def __init__(self, semantic_dim: int, cutoff: float, farthest: float, **kwargs):
        super().__init__(**kwargs)
        self.semantic_dim, self.cutoff, self.farthest = semantic_dim, cutoff, farthest
        self.generator = torch.Generator()

    def seed_step(self, seed: int) -> None:
        """Seed the next draws: the same on every rank, and after a resumption."""
        self.generator.manual_seed(seed)

    def weights(self, distances: Tensor, negative: Tensor) -> Tensor:
        """Return the weight of every negative, (B, B), rows summing to 1 where an anchor has a negative at all."""
        n = self.semantic_dim
        clamped = distances.clamp(self.cutoff, FARTHEST)
        logarithm = (2 - n) * clamped.log() - (n - 3) / 2 * (1 - clamped.square() / 4).log()
        near = negative & (distances < self.farthest)
        logarithm = logarithm.where(near, -torch.inf)
        # Where no negative is near enough, all are alike.
        alone = ~near.any(1, keepdim=True)
        logarithm = logarithm.where(~(alone & negative), 0.0)
        return torch.softmax(logarithm, 1).nan_to_num(0.0)  # a row without negatives: 0

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor):
        same = labels[:, None] == ref_labels
        weights = self.weights(self.distance(embeddings, ref_emb), ~same)
        positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        anchors, positives = (positive & (weights.sum(1, keepdim=True) > 0)).nonzero(as_tuple=True)
        # On the CPU, where the generator lives, and in float64: a draw is the same on every device, in every precision.
        drawn = (
            torch.multinomial(weights[anchors].cpu().double(), 1, generator=self.generator)[:, 0]
            if len(anchors)
            else anchors
        )
        return anchors, positives, drawn.to(anchors.device)
