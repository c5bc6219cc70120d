"""OPERA's idea: instances are discriminated in one space, and classes in another one above it (eq. 8-13).

    y = backbone(x),  z = projector(y),  q = predictor(z)        the instance space
    k = momentum encoder's projector(backbone(x'))               its keys, of the other view
    c = class head(q)                                            the class space

    L_self = CE(q_1 . k_2 / T) + CE(q_2 . k_1 / T)               q, k of length 1; the negatives are the whole batch's
    L_full = CE(c_1, label) + CE(c_2, label)                     q as it is

On one space the two would pull at each other: two images of a class are negatives to L_self and positives to L_full
(eq. 5). ``conflict`` measures that. Where the classes are read is the paper's Figure 4:

    one-space   A  linear, from q itself: both objectives on one space
    backbone    B  the class head on y
    parallel    C  the class head on z, beside the predictor
    hierarchy   D  the class head on q: OPERA
    instance       no classes: MoCo-v3
    supervised     no instances: a linear classifier on y
    supcon         no instances and no proxies: the supervised contrastive loss (arXiv 2004.11362) on z, an image
                   without a label alike to its other view alone

The paper (eq. 13) weighs the four terms alike, "printed". The release has T for each of L_self's and 1/2 for each of
L_full's, "released"; MoCo-v3 by itself has 2 T, of which OPERA's release takes half. The printed softmax sums over all
but the true key or class in its denominator, "others"; the released one over "all".
"""

import copy
from typing import NamedTuple

import torch
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from opera.heads import mlp
from shared.errors import UserError
from shared.training.ranks import gather_rows, rank, rows_of_ranks, sum_over_ranks, world_size

ARRANGEMENTS = ("one-space", "backbone", "parallel", "hierarchy", "instance", "supervised", "supcon")
LOSS_WEIGHTS = ("released", "printed")
DENOMINATORS = ("all", "others")
UNLABELLED = -1  # instead of a label


class Terms(NamedTuple):
    """The objective and its parts, 0-d each; a part that the arrangement does not have is 0."""

    total: Tensor
    instance: Tensor  # L_self
    classes: Tensor  # L_full


def mean_over_ranks(values: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return the mean, 0-d, of the values (n_r,) of all ranks, differentiably; of those alone that are ``chosen``.

    0, with gradients of 0, where there is none. The backward sums over ranks, which DistributedDataParallel's average
    undoes.
    """
    chosen = torch.ones_like(values, dtype=torch.bool) if chosen is None else chosen
    sums = torch.stack([values.where(chosen, 0.0).sum(), chosen.sum().to(values.dtype)])
    if world_size() > 1:
        sums = all_reduce(sums)
    return sums[0] / sums[1].detach().clamp_min(1)


class Encoder(nn.Module):
    """Images -> y (B, ``backbone.num_features``) -> z (B, dim)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector


class Hierarchy(nn.Module):
    """The online encoder, its momentum copy, the predictor and the class head, and the objective on two views.

    backbone: images -> features (B, C), with ``num_features`` = C. classes: 0 where there are none. heads: ``dim`` of
    the instance space, ``hidden`` width of projector and predictor, ``projector_layers``, ``predictor_layers``,
    ``predictor_norm``: whether the predictor ends with a batch norm, ``class_hidden`` width and ``class_layers`` of the
    class head. Raises UserError for unknown names, and for an arrangement that needs classes without them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        heads: dict,
        arrangement: str,
        temperature: float,
        loss_weights: str = "released",
        denominator: str = "all",
    ):
        super().__init__()
        for name, value, known in (
            ("arrangement", arrangement, ARRANGEMENTS),
            ("loss_weights", loss_weights, LOSS_WEIGHTS),
            ("denominator", denominator, DENOMINATORS),
        ):
            if value not in known:
                raise UserError(f"objective.{name}={value} is unknown: choose one of {', '.join(known)}")
        if not temperature > 0:
            raise UserError(f"temperature={temperature}: set it above 0")
        if arrangement != "instance" and classes < 2:
            raise UserError(
                f"arrangement={arrangement} needs labels of two classes or more: give a labelled set, or choose "
                "instance"
            )
        self.arrangement, self.temperature, self.loss_weights = arrangement, temperature, loss_weights
        self.only_others = denominator == "others"
        width, dim, hidden = backbone.num_features, heads["dim"], heads["hidden"]
        projects, contrasts = arrangement != "supervised", arrangement not in ("supervised", "supcon")
        projector = mlp(heads["projector_layers"], width, hidden, dim, True) if projects else nn.Identity()
        self.online = Encoder(backbone, projector)
        self.momentum = self.predictor = self.class_head = None
        if contrasts:
            self.predictor = mlp(heads["predictor_layers"], dim, hidden, dim, heads["predictor_norm"])
            self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        if arrangement in ("one-space", "supervised"):
            self.class_head = nn.Linear(width if arrangement == "supervised" else dim, classes)
        elif arrangement not in ("instance", "supcon"):
            below = width if arrangement == "backbone" else dim
            self.class_head = mlp(heads["class_layers"], below, heads["class_hidden"], classes, False)

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """Move the momentum encoder's parameters to ``momentum`` of themselves and the rest of the online ones."""
        if self.momentum is not None:
            theirs, ours = list(self.momentum.parameters()), list(self.online.parameters())
            torch._foreach_lerp_(theirs, [p.detach() for p in ours], 1 - momentum)

    def compile_encoders(self) -> None:
        """Have torch.compile compile what the views pass through, when they first do."""
        for encoder in (self.online, self.momentum):
            if encoder is not None:
                encoder.backbone.compile()

    def features(self, images: Tensor) -> Tensor:
        """Return y (B, C): what is handed on to other tasks."""
        return self.online.backbone(images)

    def spaces(self, first: Tensor, second: Tensor) -> list[dict[str, Tensor]]:
        """Return y, z, q of either view (B, ...), by these names, as far as the arrangement has them."""
        views = [{"y": y} for y in both_views(self.online.backbone, first, second)]
        for view in views:
            if self.arrangement != "supervised":
                view["z"] = self.online.projector(view["y"])
            if self.predictor is not None:
                view["q"] = self.predictor(view["z"])
        return views

    @torch.no_grad()
    def keys(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Return k of either view, (B, dim)."""
        return [self.momentum.projector(y) for y in both_views(self.momentum.backbone, first, second)]

    def logits(self, view: dict[str, Tensor]) -> Tensor:
        """Return the logits (B, classes) of a view's spaces."""
        below = {"supervised": "y", "backbone": "y", "parallel": "z"}.get(self.arrangement, "q")
        return self.class_head(view[below])

    def forward(self, first: Tensor, second: Tensor, labels: Tensor, key=None) -> Terms:
        """Return the objective of two views (B, ...) of the images with labels (B,) int64, -1 where there is none.

        Every rank gives its part of the batch and gets the objective of the whole. ``key`` says which images they are
        (``views.Key``), to arrangements that draw something of each.
        """
        instance, classes = self.terms(self.spaces(first, second), first, second, labels)
        weight = self.weights()
        return Terms(weight[0] * instance + weight[1] * classes, instance, classes)

    def weights(self) -> tuple[float, float]:
        """Return the weights of one term of L_self and of one of L_full."""
        if self.loss_weights == "printed":
            return 1.0, 1.0
        return (2 if self.arrangement == "instance" else 1) * self.temperature, 0.5

    def terms(self, views: list[dict], first: Tensor, second: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_self and L_full from the spaces of both views, 0-d each."""
        instance = classes = views[0]["y"].new_zeros(())
        counts = rows_of_ranks(len(first), first.device)
        if self.predictor is not None:
            keys = self.keys(first, second)[::-1]  # of the other view
            instance = sum(
                info_nce(v["q"], key, self.temperature, self.only_others, counts)
                for v, key in zip(views, keys, strict=True)
            )
        if self.class_head is not None:
            classes = sum(cross_entropy(self.logits(view), labels, self.only_others) for view in views)
        if self.arrangement == "supcon":
            classes = supervised_contrast([view["z"] for view in views], labels, self.temperature, counts)
        return instance, classes


def both_views(network: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Return a network's outputs for both views: of one pass on a GPU where no batch statistics tell it from two.

    On a CPU two passes are the faster ones, whose activations are half as large.
    """
    normed = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())
    if normed or not launches_are_dear(first.device):
        return network(first), network(second)
    return network(torch.cat([first, second])).chunk(2)


def launches_are_dear(device: torch.device) -> bool:
    """Return whether a device is faster with one large batch than with two halves of it."""
    return device.type == "cuda"


def softmax_loss(logits: Tensor, targets: Tensor, only_others: bool) -> Tensor:
    """Return the losses (B,) of logits (B, N) at targets (B,) int64; 0 where the target is -1.

    ``only_others``: the target is left out of the denominator, as eq. 13 prints it, and a loss may be below 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not only_others:
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=UNLABELLED)
    place = targets.clamp_min(0)[:, None]
    others = logits.scatter(1, place, -torch.inf).logsumexp(1)
    return torch.where(targets >= 0, others - logits.gather(1, place)[:, 0], 0.0)


def info_nce(
    queries: Tensor, keys: Tensor, temperature: float, only_others: bool = False, counts: list[int] | None = None
) -> Tensor:
    """Return the mean loss, 0-d, of finding an image's own key among those of all ranks.

    queries, keys: (B, dim) of this rank, of any length; no gradient goes to keys. ``counts``: B of every rank, where
    it is known (``rows_of_ranks``).
    """
    counts = rows_of_ranks(len(keys), keys.device) if counts is None else counts
    queries = F.normalize(queries.float() if queries.dtype == torch.bfloat16 else queries, dim=1)
    keys = F.normalize(keys.to(queries.dtype), dim=1)
    own = sum(counts[: rank()]) + torch.arange(len(keys), device=keys.device)
    with torch.autocast(queries.device.type, enabled=False):
        similarity = queries @ gather_rows(keys.detach(), counts).T / temperature  # (B, all)
        return mean_over_ranks(softmax_loss(similarity, own, only_others))


def cross_entropy(logits: Tensor, labels: Tensor, only_others: bool = False) -> Tensor:
    """Return the mean loss, 0-d, over the labelled images of all ranks; 0 where none is labelled."""
    return mean_over_ranks(softmax_loss(logits, labels, only_others), labels != UNLABELLED)


def supervised_contrast(
    embeddings: list[Tensor], labels: Tensor, temperature: float, counts: list[int] | None = None
) -> Tensor:
    """Return the supervised contrastive loss, 0-d, of both views' embeddings (B, dim) of all ranks, of any length.

    An image without a label is alike to its other view alone. ``counts`` as for ``info_nce``.
    """
    counts = rows_of_ranks(len(labels), labels.device) if counts is None else counts
    alone = -2 - sum(counts[: rank()]) - torch.arange(len(labels), device=labels.device)
    every_label = gather_rows(torch.where(labels == UNLABELLED, alone, labels), counts)
    rows = [gather_rows(view.to(torch.promote_types(view.dtype, torch.float32)), counts) for view in embeddings]
    with torch.autocast(labels.device.type, enabled=False):
        return SupConLoss(temperature)(torch.cat(rows), every_label.repeat(2))


def conflict(hierarchy: Hierarchy, first: Tensor, second: Tensor, labels: Tensor) -> float:
    """Return the cosine between the gradients of L_self and L_full to y, of both views of all ranks' batch (eq. 5).

    Below 0 a step for the one is a step against the other. The network is left as it was, batch statistics included
    where it is in evaluation mode. Raises UserError for an arrangement that has one of the two alone.
    """
    if hierarchy.predictor is None or hierarchy.class_head is None:
        raise UserError(f"arrangement={hierarchy.arrangement} has one objective alone: nothing can conflict")
    views = hierarchy.spaces(first, second)
    y = [view["y"] for view in views]
    instance, classes = hierarchy.terms(views, first, second, labels)
    of_instances, of_classes = (
        torch.cat([g.flatten() for g in torch.autograd.grad(term, y, retain_graph=True)]).double()
        for term in (instance, classes)
    )
    products = of_instances @ of_classes, of_instances @ of_instances, of_classes @ of_classes
    both, lengths = sum_over_ranks(torch.stack(products)).split([1, 2])
    return float(both / lengths.prod().sqrt().clamp_min(torch.finfo(torch.float64).tiny))
