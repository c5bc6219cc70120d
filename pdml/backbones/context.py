"""What the dense backbones share: a view of the whole patch, and one pass for patches and for scenes.

"Global" in the abstract of PDML (arXiv 2211.08349) is interpreted as: the feature of every pixel depends on
every pixel of its patch. Convolutions alone do not reach across the patch from its corners, so the patch
mean, through a linear layer, is added to every pixel. Every method that uses a backbone gets the same layer.

A backbone is `local` (convolutions, zero-padded, same size out), then `context` (what looks at the whole
patch), then `head` (per pixel). On a scene the three run once over the mirrored image instead of once per
patch, and `context` uses sliding windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError

# Rows of a scene whose convolutions run together: bounds memory, the result does not depend on it.
STRIP_ROWS = 32


class GlobalContext(nn.Module):
    """Adds a linear map of the patch mean to the feature of every pixel."""

    def __init__(self, features: int):
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, p, p) -> (B, F, p, p)."""
        return features + self.linear(features.mean((2, 3)))[:, :, None, None]

    def scene(self, features: Tensor, patch_size: int) -> Tensor:
        """(1, F, H + p - 1, W + p - 1) -> (1, F, H, W): each pixel with the mean of its own window."""
        mean = F.avg_pool2d(features, patch_size, stride=1)
        added = F.conv2d(mean, self.linear.weight[:, :, None, None], self.linear.bias)
        return crop(features, patch_size // 2) + added


class Backbone(nn.Module):
    """A network that keeps one feature per pixel; subclasses set `context`, `head` and define `local`.

    Raises UserError if the patch size is not odd or the bands are too few for the spectral kernels.
    """

    dense = True  # whether every pixel keeps a feature

    def __init__(self, bands: int, patch_size: int, out_features: int, fewest_bands: int, reach: int):
        super().__init__()
        if patch_size % 2 == 0:
            raise UserError(f"patch_size is {patch_size}; a patch needs a centre pixel: choose an odd one.")
        if bands < fewest_bands:
            name = type(self).__name__
            raise UserError(f"{name} was given {bands} bands or components: raise them to {fewest_bands}.")
        self.bands, self.patch_size, self.out_features = bands, patch_size, out_features
        # pixels that `local` looks at in each direction
        self.reach = reach
        self.context: nn.Module
        self.head: nn.Module = nn.Identity()

    def local(self, image: Tensor) -> Tensor:
        """(B, bands, H, W) -> (B, F, H, W), zeros outside the image."""
        raise NotImplementedError

    def forward(self, patches: Tensor) -> Tensor:
        """(B, bands, p, p) -> (B, out_features, p, p)."""
        return self.head(self.context(self.local(patches)))

    def forward_scene(self, image: Tensor) -> Tensor:
        """(1, bands, H, W) -> (1, out_features, H, W): each pixel's feature at the centre of its own patch.

        Patches reach over the border by mirroring, so H and W must exceed p // 2. Where a patch would see
        zeros beyond its edge, this pass sees the neighbouring pixels: results differ by that padding only.
        """
        radius = self.patch_size // 2
        mirrored = F.pad(image, (radius,) * 4, mode="reflect")
        height = mirrored.shape[2]
        strips = []
        for top in range(0, height, STRIP_ROWS):
            bottom = min(top + STRIP_ROWS, height)
            start = max(top - self.reach, 0)
            strip = self.local(mirrored[:, :, start : min(bottom + self.reach, height)])
            strips.append(strip[:, :, top - start : bottom - start])
        return self.head(self.context.scene(torch.cat(strips, 2), self.patch_size))


def crop(image: Tensor, margin: int) -> Tensor:
    """(B, F, H, W) -> the same without `margin` pixels on each side."""
    height, width = image.shape[2:]
    return image[:, :, margin : height - margin, margin : width - margin]
