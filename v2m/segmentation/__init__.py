"""Networks as backbones of UPerNet (trained by ``shared/dense``): pyramids, and plain networks by their blocks."""

from v2m.detection import pyramid_maps
from v2m.segmentation.plain import PlainBackbone

plain_maps = PlainBackbone

__all__ = ["plain_maps", "pyramid_maps"]
