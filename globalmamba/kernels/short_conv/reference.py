"""The short convolution of a grid in plain PyTorch: runs on every device, can be exported, judges the compiled one.

A depthwise convolution of channels-last images whose kernel is one token high or wide: for the way back the kernel is
mirrored, never the image.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

# (whether along a column, whether from its end)
DIRECTIONS = {"right": (False, False), "left": (False, True), "down": (True, False), "up": (True, True)}


def forward(x: Tensor, weight: Tensor, bias: Tensor, directions: tuple[str, ...], side_by_side: bool = False) -> Tensor:
    """(B, S, H, W, D), (K, D, T), (K, D) -> (B, K, H, W, D), differentiable; see ``short_conv``."""
    with torch.autocast(x.device.type, enabled=False) if x.device.type != "meta" else nullcontext():
        readers = len(directions) // x.shape[1]
        images = x.permute(0, 1, 4, 2, 3)  # (B, S, D, H, W)
        results = [
            _convolved(images[:, group // readers], weight[group], bias[group], *DIRECTIONS[name])
            for group, name in enumerate(directions)
        ]
        dense = torch.stack([result.permute(0, 2, 3, 1) for result in results], 3 if side_by_side else 1)
        out = F.silu(dense)
        return out.movedim(3, 1) if side_by_side else out


def _convolved(image: Tensor, taps: Tensor, offset: Tensor, column: bool, back: bool) -> Tensor:
    """(B, D, H, W), (D, T), (D,) -> (B, D, H, W)."""
    width, reach = taps.shape[0], taps.shape[1] - 1
    kernel = (taps.flip(1) if back else taps)[:, None]  # (D, 1, T)
    kernel, padding = (kernel[..., None], (reach, 0)) if column else (kernel[:, :, None], (0, reach))
    result = F.conv2d(image, kernel, offset, padding=padding, groups=width)
    axis = -2 if column else -1
    return result.narrow(axis, reach if back else 0, image.shape[axis])
