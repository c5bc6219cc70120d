"""Pyramids as backbones of Mask R-CNN (trained by ``shared/dense``) and of UPerNet: four maps at 1/4 to 1/32."""

from torch import nn

from shared.dense.model import Padded


def pyramid_maps(network: nn.Module) -> Padded:
    """Return a pyramid that gives its four stages (``features_only``) as a backbone for images of any size."""
    channels, strides = zip(*((stage["num_chs"], stage["reduction"]) for stage in network.feature_info), strict=True)
    # A pyramid alone takes any size; frequency levels must divide it.
    unit = network.patch_size << (network.levels - 1) if hasattr(network, "levels") else 1
    return Padded(network, unit, channels, strides)
