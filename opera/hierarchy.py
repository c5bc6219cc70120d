"""OPERA's idea: the instances are told apart in one space, and the classes in another one above it (eq. 8-13).

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

The paper (eq. 13) weighs the four terms alike, "printed". The release has T for each of L_self's and 1/2 for each of
L_full's, "released".
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opera.heads import mlp
from shared.errors import UserError
from shared.run.ranks import gather_rows, mean_over_ranks, rank

ARRANGEMENTS = ("one-space", "backbone", "parallel", "hierarchy", "instance", "supervised")
LOSS_WEIGHTS = ("released", "printed")
UNLABELLED = -1  # in the place of a label


class Terms(NamedTuple):
    """The objective and its parts, 0-d each; a part that the arrangement has not is 0."""

    total: Tensor
    instance: Tensor  # L_self
    classes: Tensor  # L_full


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
    ):
        super().__init__()
        if arrangement not in ARRANGEMENTS or loss_weights not in LOSS_WEIGHTS:
            raise UserError(
                f"arrangement={arrangement}, loss_weights={loss_weights}: choose the arrangement from "
                f"{', '.join(ARRANGEMENTS)}, the weights from {', '.join(LOSS_WEIGHTS)}"
            )
        if not temperature > 0:
            raise UserError(f"temperature={temperature}: set it above 0")
        if arrangement != "instance" and classes < 2:
            raise UserError(
                f"arrangement={arrangement} needs labels of two classes or more: give a labelled set, or choose "
                "instance"
            )
        self.arrangement, self.temperature, self.loss_weights = arrangement, temperature, loss_weights
        width, dim, hidden = backbone.num_features, heads["dim"], heads["hidden"]
        contrasts = arrangement != "supervised"
        projector = mlp(heads["projector_layers"], width, hidden, dim, True) if contrasts else nn.Identity()
        self.online = Encoder(backbone, projector)
        self.momentum = self.predictor = self.class_head = None
        if contrasts:
            self.predictor = mlp(heads["predictor_layers"], dim, hidden, dim, heads["predictor_norm"])
            self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        if arrangement in ("one-space", "supervised"):
            self.class_head = nn.Linear(width if arrangement == "supervised" else dim, classes)
        elif arrangement != "instance":
            below = width if arrangement == "backbone" else dim
            self.class_head = mlp(heads["class_layers"], below, heads["class_hidden"], classes, False)

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """Move the momentum encoder's parameters to ``momentum`` of themselves and the rest of the online ones."""
        if self.momentum is not None:
            theirs, ours = list(self.momentum.parameters()), list(self.online.parameters())
            torch._foreach_lerp_(theirs, [p.detach() for p in ours], 1 - momentum)

    def features(self, images: Tensor) -> Tensor:
        """Return y (B, C): what is handed on to other tasks."""
        return self.online.backbone(images)

    def spaces(self, first: Tensor, second: Tensor) -> list[dict[str, Tensor]]:
        """Return y, z, q of either view (B, ...), by these names; of ``supervised`` y alone."""
        found = [{"y": y} for y in both_views(self.online.backbone, first, second)]
        if self.predictor is not None:
            for view in found:
                view["z"] = self.online.projector(view["y"])
                view["q"] = self.predictor(view["z"])
        return found

    @torch.no_grad()
    def keys(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Return k of either view, (B, dim)."""
        return [self.momentum.projector(y) for y in both_views(self.momentum.backbone, first, second)]

    def logits(self, view: dict[str, Tensor]) -> Tensor:
        """Return the logits (B, classes) of a view's spaces."""
        below = {"supervised": "y", "backbone": "y", "parallel": "z"}.get(self.arrangement, "q")
        return self.class_head(view[below])

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Terms:
        """Return the objective of two views (B, ...) of the images with labels (B,) int64, -1 where there is none.

        Every rank gives its part of the batch and gets the objective of the whole.
        """
        instance, classes = self.terms(self.spaces(first, second), first, second, labels)
        # Weights of one term each: the release's 2 T and 1/2 of L_self are T.
        weight = (self.temperature, 0.5) if self.loss_weights == "released" else (1.0, 1.0)
        return Terms(weight[0] * instance + weight[1] * classes, instance, classes)

    def terms(
        self, views: list[dict], first: Tensor, second: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return L_self and L_full from the spaces of both views, 0-d each."""
        instance = classes = views[0]["y"].new_zeros(())
        if self.predictor is not None:
            keys = self.keys(first, second)[::-1]  # of the other view
            instance = sum(
                info_nce(v["q"], key, self.temperature) for v, key in zip(views, keys, strict=True)
            )
        if self.class_head is not None:
            classes = sum(cross_entropy(self.logits(view), labels) for view in views)
        return instance, classes


def both_views(network: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Return a network's outputs for both views: of one pass where no batch statistics tell it from two."""
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
        return network(first), network(second)
    return network(torch.cat([first, second])).chunk(2)


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy, 0-d, of finding an image's own key among those of all ranks.

    queries, keys: (B, dim) of this rank, of any length; no gradient goes to keys.
    """
    queries = F.normalize(queries.float() if queries.dtype == torch.bfloat16 else queries, dim=1)
    keys = F.normalize(keys.to(queries.dtype), dim=1)
    counts = gather_rows(torch.tensor([len(keys)], device=keys.device)).tolist()
    own = sum(counts[: rank()]) + torch.arange(len(keys), device=keys.device)
    with torch.autocast(queries.device.type, enabled=False):
        similarity = queries @ gather_rows(keys.detach()).T / temperature  # (B, all)
    return mean_over_ranks(F.cross_entropy(similarity, own, reduction="none"))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy, 0-d, over the labelled images of all ranks; 0 where none is labelled."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED)
    return mean_over_ranks(losses, labels != UNLABELLED)


def conflict(hierarchy: Hierarchy, first: Tensor, second: Tensor, labels: Tensor) -> float:
    """Return the cosine between the gradients of L_self and L_full to y, both views of this rank's batch (eq. 5).

    Below 0 a step for the one is a step against the other. The network is left as it was, batch statistics included
    where it is in evaluation mode. Raises UserError for an arrangement that has one of the two alone.
    """
    if hierarchy.predictor is None or hierarchy.class_head is None:
        raise UserError(f"arrangement={hierarchy.arrangement} has one objective alone: nothing can conflict")
    views = hierarchy.spaces(first, second)
    y = [view["y"] for view in views]
    instance, classes = hierarchy.terms(views, first, second, labels)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(term, y, retain_graph=True)])
        for term in (instance, classes)
    ]
    return float(F.cosine_similarity(*gradients, dim=0))
