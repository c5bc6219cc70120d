"""The seven losses that the paper trains, each with the metric of its baseline or with the introspective one.

pytorch-metric-learning has the losses and the miners; this file chooses the metric that they measure with, and that
loss and miner share it. A loss of a distance takes D_IN (or D_IN^2), a loss of a similarity takes s_IN.
"""

from typing import Any

import torch
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from torch import Tensor, nn

from idml.distance_weighted import DistanceWeightedSampler
from idml.introspective import IntrospectiveDistance, IntrospectiveSimilarity
from idml.released import ReleasedProxyAnchor
from shared.errors import UserError

PROXY_LOSSES = ("proxynca", "proxy-anchor")
METRICS = ("plain", "introspective", "released")


class MetricLoss(nn.Module):
    """A loss and, where it has one, its miner: embeddings (B, width), labels (B,) int64 -> 0-d loss.

    Embeddings are [semantic | uncertainty], or semantic alone; they are measured in float32 or float64.
    Raises UserError where a batch has nothing to compare: one class alone, for a loss without proxies.
    """

    def __init__(self, name: str, loss: nn.Module, miner: nn.Module | None = None):
        super().__init__()
        self.name, self.loss, self.miner = name, loss, miner

    def proxies(self) -> list[nn.Parameter]:
        """Return the parameters of the loss: proxies, or the borders of the margin loss."""
        return list(self.loss.parameters())

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.name not in PROXY_LOSSES and len(labels) and bool((labels == labels[0]).all()):
            raise UserError(
                f"a batch of {len(labels)} images has one class alone, and {self.name} compares classes: raise "
                "optim.batch_size, or lower data.per_class"
            )
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        # 2 - 2 cos of near images would lose its digits in the products of a reduced precision.
        with torch.autocast(embeddings.device.type, enabled=False):
            if self.miner is None:
                return self.loss(embeddings, labels)
            return self.loss(embeddings, labels, self.miner(embeddings, labels))


def _distance(kind: str, metric: dict[str, Any], semantic_dim: int, **options) -> BaseDistance:
    """Return the metric of a loss, as a "distance" or as a "similarity"."""
    if metric["name"] == "plain":
        return LpDistance(**options) if kind == "distance" else CosineSimilarity(**options)
    values = {key: value for key, value in metric.items() if key != "name"}
    of_kind = IntrospectiveDistance if kind == "distance" else IntrospectiveSimilarity
    return of_kind(semantic_dim, **values, **options)


def build_loss(loss: dict[str, Any], metric: dict[str, Any], classes: int, semantic_dim: int) -> MetricLoss:
    """Return the loss ``loss["name"]`` with the metric ``metric["name"]``; the other keys are their constants.

    ``classes``: training classes, numbered from 0. Raises UserError for an unknown name, and for the released metric
    with another loss than proxy-anchor.
    """
    name, constants = loss["name"], {key: value for key, value in loss.items() if key != "name"}
    if name not in BUILDERS or metric["name"] not in METRICS:
        raise UserError(
            f"loss.name={name}, metric.name={metric['name']}: choose the loss from {', '.join(BUILDERS)}, the metric "
            f"from {', '.join(METRICS)}"
        )
    if metric["name"] == "released":
        if name != "proxy-anchor":
            raise UserError(
                f"loss.name={name} with metric.name=released is not defined, the released wrapper takes no "
                "uncertainty: choose proxy-anchor, or metric.name=introspective"
            )
        values = {key: value for key, value in metric.items() if key != "name"}
        return MetricLoss(name, ReleasedProxyAnchor(classes, semantic_dim, **constants, **values))
    return BUILDERS[name](constants, metric, classes, semantic_dim)


def _triplet(constants, metric, classes, semantic_dim) -> MetricLoss:
    distance = _distance("distance", metric, semantic_dim)
    miner = miners.TripletMarginMiner(constants["margin"], "semihard", distance=distance)
    return MetricLoss("triplet", losses.TripletMarginLoss(constants["margin"], distance=distance), miner)


def _proxynca(constants, metric, classes, semantic_dim) -> MetricLoss:
    distance = _distance("distance", metric, semantic_dim, power=2)
    return MetricLoss(
        "proxynca", losses.ProxyNCALoss(classes, semantic_dim, softmax_scale=constants["scale"], distance=distance)
    )


def _fastap(constants, metric, classes, semantic_dim) -> MetricLoss:
    distance = _distance("distance", metric, semantic_dim, power=2)
    return MetricLoss("fastap", losses.FastAPLoss(constants["bins"], distance=distance))


class PooledReducer(reducers.MultipleReducers):
    """The sum over all pairs with a loss, positive and negative ones, by their number together, as GeDML has it."""

    def __init__(self):
        super().__init__({})

    def forward(self, loss_dict, embeddings, labels):
        every = torch.cat([part["losses"].flatten() for part in loss_dict.values() if torch.is_tensor(part["losses"])])
        return every.sum() / (every > 0).sum().clamp_min(1)


def _contrastive(constants, metric, classes, semantic_dim) -> MetricLoss:
    distance = _distance("distance", metric, semantic_dim)
    margins = constants["positive_margin"], constants["negative_margin"]
    if constants["reduction"] not in REDUCTIONS:
        raise UserError(f"loss.reduction={constants['reduction']}: choose it from {', '.join(REDUCTIONS)}")
    reducer = REDUCTIONS[constants["reduction"]]()
    return MetricLoss("contrastive", losses.ContrastiveLoss(*margins, distance=distance, reducer=reducer))


def _margin(constants, metric, classes, semantic_dim) -> MetricLoss:
    distance = _distance("distance", metric, semantic_dim)
    loss = losses.MarginLoss(
        margin=constants["margin"],
        nu=constants["nu"],
        beta=constants["beta"],
        learn_beta=True,
        num_classes=classes,
        distance=distance,
    )
    sampler = DistanceWeightedSampler(semantic_dim, constants["cutoff"], constants["farthest"], distance=distance)
    return MetricLoss("margin", loss, sampler)


def _multi_similarity(constants, metric, classes, semantic_dim) -> MetricLoss:
    distance = _distance("similarity", metric, semantic_dim)
    loss = losses.MultiSimilarityLoss(constants["alpha"], constants["beta"], constants["base"], distance=distance)
    return MetricLoss("multi-similarity", loss, miners.MultiSimilarityMiner(constants["epsilon"], distance=distance))


def _proxy_anchor(constants, metric, classes, semantic_dim) -> MetricLoss:
    distance = _distance("similarity", metric, semantic_dim)
    return MetricLoss(
        "proxy-anchor",
        losses.ProxyAnchorLoss(
            classes, semantic_dim, margin=constants["margin"], alpha=constants["alpha"], distance=distance
        ),
    )


REDUCTIONS = {"pooled": PooledReducer, "separate": reducers.AvgNonZeroReducer}
BUILDERS = {
    "triplet": _triplet,
    "proxynca": _proxynca,
    "fastap": _fastap,
    "contrastive": _contrastive,
    "margin": _margin,
    "multi-similarity": _multi_similarity,
    "proxy-anchor": _proxy_anchor,
}
