"""Registering networks of experiments under timm's names: what the papers' lists of names (timm_models.py) share.

Each is the model of an ImageNet-1K experiment: the YAML is the whole truth. There are no pretrained weights.
"""

from collections.abc import Callable

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn

from shared.errors import UserError

from ..model_base import CHANNELS


def settings(*, plain: bool, fixed_input_size: bool, first_conv: str) -> dict:
    """Return what timm is to know of a network; ``plain``: of one resolution, so without stages."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (CHANNELS, 224, 224),
        "fixed_input_size": fixed_input_size,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv if plain else "patch_embed.0",
        "classifier": "head" if plain else "classifier.head",
    }


def register(name: str, row: str, network_of: Callable[..., nn.Module], *, plain: bool, module: str) -> None:
    """Make the function that timm calls, under the name and the module that timm reads from it.

    It builds ``network_of(row, ...)`` with timm's arguments, and raises UserError for stages of a plain network.
    ``module`` has ``default_cfgs`` of the name. A name that timm has keeps timm's network.
    """
    if timm.is_model(name):
        return

    def create(pretrained: bool = False, **options):
        if options.get("features_only") and plain:
            raise UserError(f"{name} has one resolution and so no stages: features_only is for the pyramids")
        features = {"feature_cls": "getter", "out_indices": (0, 1, 2, 3)}
        return build_model_with_cfg(network_of, name, pretrained, feature_cfg=features, row=row, **options)

    create.__name__ = create.__qualname__ = name
    create.__module__ = module
    create.__doc__ = f"Return the network of the experiment {row}."
    register_model(create)
