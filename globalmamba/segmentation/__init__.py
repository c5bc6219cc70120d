"""Networks as backbones of UPerNet (trained by ``shared/dense``): the pyramids, as in detection."""

from torch import nn

from globalmamba.detection import pyramid_maps
from shared.dense.model import Padded
from shared.errors import UserError


def plain_maps(network: nn.Module, blocks: list[int], resize: bool) -> Padded:
    """Raise UserError: tokens of several frequency levels make up no grid that a segmenter could read."""
    raise UserError("a plain network of frequency levels has no maps for a segmenter: choose a pyramid")


__all__ = ["plain_maps", "pyramid_maps"]
