"""A pre-training step as MoCo-v3 and the release compose it: what ours is measured against.

The views are made image by image on the CPU by torchvision.transforms.v2, with draws of its own; either encoder is
passed once for each view; the momentum encoder is moved parameter by parameter. Network and objective are ours, OPERA's
with the weights of the release.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from opera.hierarchy import Hierarchy
from opera.views import ViewsConfig

SOLARIZED = 0.5  # from this value on


def build_views(cfg: ViewsConfig) -> list[v2.Compose]:
    """Return the two augmentations of an image uint8 (3, H, W) to float32 (3, S, S), normalised."""
    kernel = 2 * math.ceil(3 * cfg.blur_sigma[1]) + 1
    views = []
    for blur, solarize in zip(cfg.blur, cfg.solarize, strict=True):
        parts = [
            v2.RandomResizedCrop(cfg.image_size, tuple(cfg.scale), tuple(cfg.ratio), antialias=True),
            v2.RandomHorizontalFlip(cfg.flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(*cfg.jitter)], cfg.jitter_probability),
            v2.RandomGrayscale(cfg.grey),
        ]
        parts += [v2.RandomApply([v2.GaussianBlur(kernel, tuple(cfg.blur_sigma))], blur)] if blur else []
        parts += [v2.RandomSolarize(SOLARIZED, solarize)] if solarize else []
        views.append(v2.Compose([*parts, v2.Normalize(list(cfg.mean), list(cfg.std))]))
    return views


def view_batch(views: list[v2.Compose], images: Tensor) -> list[Tensor]:
    """Return both views (b, 3, S, S) of images uint8 (b, 3, H, W), one image after the other."""
    return [torch.stack([view(image) for image in images]) for view in views]


def objective(model: Hierarchy, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """Return the release's objective, 0-d, of two views (B, 3, S, S) of images that all have labels, on one device."""
    queries, logits = [], []
    for view in (first, second):
        query = model.predictor(model.online.projector(model.online.backbone(view)))
        query = query.float() if query.dtype == torch.bfloat16 else query
        queries.append(F.normalize(query, dim=1))
        logits.append(model.class_head(query))
    with torch.no_grad():
        keys = [
            F.normalize(model.momentum.projector(model.momentum.backbone(view)).to(queries[0].dtype), dim=1)
            for view in (first, second)
        ]
    own, temperature = torch.arange(len(labels), device=labels.device), model.temperature
    contrast = sum(
        2 * temperature * F.cross_entropy(query @ key.T / temperature, own)
        for query, key in zip(queries, keys[::-1], strict=True)
    )
    classes = sum(F.cross_entropy(output.to(queries[0].dtype), labels) for output in logits)
    return 0.5 * contrast + 0.5 * classes


@torch.no_grad()
def update_momentum(model: Hierarchy, momentum: float) -> None:
    """Move the momentum encoder, parameter by parameter."""
    for ours, theirs in zip(model.online.parameters(), model.momentum.parameters(), strict=True):
        theirs.data = theirs.data * momentum + ours.data * (1 - momentum)
