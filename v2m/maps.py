"""The network of a row, untrained, as the backbone of its detector or segmenter."""

from collections.abc import Callable

import torch
from torch import nn

from shared.dense.model import Padded
from shared.errors import UserError

from .model_base import CHANNELS
from .schema import ClassificationConfig
from .segmentation import plain_maps, pyramid_maps

STAGES = (0, 1, 2, 3)


def is_pyramid(cfg: ClassificationConfig) -> bool:
    """Return whether a row's network has stages of several sizes."""
    return "dims" in cfg.model.network


def features_of(cfg: ClassificationConfig, build: Callable[..., nn.Module]) -> nn.Module:
    """Return a row's network without a classifier, untrained, built by the paper's ``model.build_network``.

    Raises UserError for a network that has no maps of the sizes that a detector asks for.
    """
    if cfg.dense.kind == "detection" and not is_pyramid(cfg):
        raise UserError(f"model {cfg.model.name} is no pyramid, and a detector asks for maps of four sizes")
    return build(
        cfg.model,
        image_size=cfg.data.image_size,
        channels=CHANNELS,
        classes=0,
        backend=cfg.trainer.backend,
        drop_path=cfg.dense.drop_path,
        **({"features_only": True, "out_indices": STAGES} if is_pyramid(cfg) else {}),
    )


def maps_of(cfg: ClassificationConfig, network: nn.Module) -> Padded:
    """Return what ``features_of`` gave as a backbone for images of any size."""
    if is_pyramid(cfg):
        return pyramid_maps(network)
    return plain_maps(network, list(cfg.dense.blocks), cfg.dense.resize)


def meta_backbone(cfg: ClassificationConfig, build: Callable[..., nn.Module]) -> Padded:
    """Return the backbone of a row without data, on the meta device, for what is counted and not computed."""
    with torch.device("meta"):
        return maps_of(cfg, features_of(cfg, build))
