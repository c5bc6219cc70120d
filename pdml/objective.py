"""What PDML minimises: a softmax over distances to class distributions, and a metric loss between pixels."""

import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn
from torch.nn import functional as F

from pdml.distance import GaussianDistance

PAIR_LOSSES = {
    "contrastive": losses.ContrastiveLoss,
    "triplet": losses.TripletMarginLoss,
    "multi_similarity": losses.MultiSimilarityLoss,
    "proxy_anchor": losses.ProxyAnchorLoss,
}


def pair_loss(name: str, distance: GaussianDistance, classes: int, width: int) -> nn.Module:
    """Return the named loss of pytorch_metric_learning over ``distance``, with the library's defaults."""
    if name == "proxy_anchor":
        return losses.ProxyAnchorLoss(num_classes=classes, embedding_size=2 * width, distance=distance)
    if name == "contrastive" and distance.is_inverted:
        # The library's margins 0 and 1 are for distances; 1 and 0 are the same for similarities.
        return losses.ContrastiveLoss(pos_margin=1, neg_margin=0, distance=distance)
    return PAIR_LOSSES[name](distance=distance)


def draw_pixels(keys: Tensor, at_most: int) -> Tensor:
    """Return the positions (at most ``at_most``) of the smallest keys, in the order of their keys.

    ``keys`` (N,) are 62-bit hashes; centre pixels carry negative ones and so come before all others.
    """
    return torch.argsort(keys, stable=True)[:at_most]


class ClassDistributions(nn.Module):
    """One learned Gaussian per class; log-probabilities are the softmax over distances to them.

    The temperature is chosen for training and never fitted to frequencies: the probabilities order the classes, and
    are not calibrated.
    ``place`` puts them where the first step's pixels are, before they are learned.
    """

    def __init__(self, classes: int, width: int, temperature: float):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(classes, width))
        self.log_variance = nn.Parameter(torch.zeros(classes, width))
        self.temperature = temperature

    @torch.no_grad()
    def place(self, embedding: Tensor, labels: Tensor) -> None:
        """Put each class on the mean of its pixels, embedding (N, 2D); one without any, at random among all."""
        means, log_variances = embedding.chunk(2, dim=1)
        self.mean.mul_(means.std(0)).add_(means.mean(0))
        self.log_variance.copy_(log_variances.mean(0).expand_as(self.log_variance))
        for label in labels.unique():
            self.mean[label] = means[labels == label].mean(0)

    def forward(self, embedding: Tensor, distance: GaussianDistance) -> Tensor:
        """(N, 2D) -> log-probabilities (N, C)."""
        classes = torch.cat([self.mean, self.log_variance], 1)
        sign = 1.0 if distance.is_inverted else -1.0
        return F.log_softmax(sign * self.temperature * distance(embedding, classes), dim=1)


class Objective(nn.Module):
    """loss = cross-entropy of every labelled pixel + ``pair_weight`` x metric loss of at most ``pixels`` pixels.

    ``embedding`` (N, 2D) = [mean | log-variance] of the labelled training pixels of all patches of a step,
    ``labels`` (N,) in 0..C-1, ``keys`` (N,) int64, negative for centre pixels. Returns the loss, 0-d.
    """

    def __init__(
        self, metric: str, loss: str, pair_weight: float, temperature: float, pixels: int, classes: int, width: int
    ):
        super().__init__()
        self.distance = GaussianDistance(metric)
        self.classes = ClassDistributions(classes, width, temperature)
        self.pair_loss = pair_loss(loss, self.distance, classes, width)
        self.pair_weight, self.pixels = pair_weight, pixels

    def forward(self, embedding: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        drawn = draw_pixels(keys, self.pixels)
        if not self.distance.calibrated:
            self.distance.calibrate(embedding[drawn].detach())
            self.classes.place(embedding.detach(), labels)
        # One loss per class on distances, one per pair: the mean over pixels keeps their balance at any count.
        loss = F.nll_loss(self.classes(embedding, self.distance), labels)
        return loss + self.pair_weight * self.pair_loss(embedding[drawn], labels[drawn])
