"""SSRN: spectral-spatial residual network, dense and as published.

Z. Zhong, J. Li, Z. Luo, M. Chapman, IEEE TGRS 56(2), 2018, https://doi.org/10.1109/TGRS.2017.2755542.
Layer table: 24 spectral kernels of length 7, stride 2; two spectral residual blocks (two convolutions of
length 7 each); 128 kernels over the whole remaining spectral axis; 24 kernels 3 x 3 x 128; two spatial
residual blocks (two 3 x 3 convolutions each); average over the pixels; dropout 0.5 (as in the released code).
Batch normalisation and ReLU come before the convolution inside a block (the paper's equations for X^{p+1} and
X^{p+2}), and once more after the last block.

The dense form departs in two points: the 3 x 3 x 128 convolution is zero-padded, so that every pixel keeps a
feature; and the average over the pixels is added to each of them through a linear layer, not put in their
place. Its dropout leaves out a feature for the whole patch, as it does in the paper.

Layout: the spectral axis lies along the height and the pixels of the patch along the width of a channels-last
tensor, because 2-D convolutions are about twice as fast as 3-D ones on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdml.backbones.context import Backbone, GlobalContext


class ResidualBlock(nn.Module):
    """x + conv(ReLU(BN(conv(ReLU(BN(x)))))), each convolution keeping the size."""

    def __init__(self, width: int, kernel: tuple[int, int]):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, kernel, padding=padding)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, ., .) -> the same shape."""
        inner = self.conv1(F.relu(self.norm1(x), inplace=True))
        return x + self.conv2(F.relu(self.norm2(inner), inplace=True))


class _Layers(Backbone):
    """What both forms share; ``padding`` is that of the 3 x 3 x 128 convolution."""

    padding: int

    def __init__(
        self,
        bands: int,
        patch_size: int,
        spectral_width: int,
        spectral_kernel: int,
        joint_width: int,
        spatial_width: int,
        blocks: int,
        dropout: float,
    ):
        super().__init__(bands, patch_size, spatial_width, spectral_kernel, reach=1 + 2 * blocks)
        length = (bands - spectral_kernel) // 2 + 1
        along = (spectral_kernel, 1)
        self.spectral = nn.Sequential(
            nn.Conv2d(1, spectral_width, along, stride=(2, 1)),
            *[ResidualBlock(spectral_width, along) for _ in range(blocks)],
            nn.BatchNorm2d(spectral_width),
            nn.ReLU(inplace=True),
            nn.Conv2d(spectral_width, joint_width, (length, 1)),
            nn.BatchNorm2d(joint_width),
            nn.ReLU(inplace=True),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(joint_width, spatial_width, 3, padding=self.padding),
            *[ResidualBlock(spatial_width, (3, 3)) for _ in range(blocks)],
            nn.BatchNorm2d(spatial_width),
            nn.ReLU(inplace=True),
        )
        self.to(memory_format=torch.channels_last)
        self.context = GlobalContext(spatial_width) if self.dense else nn.Identity()
        # One feature per patch or per pixel: it is left out for the whole patch, as in the paper.
        self.head = nn.Dropout2d(dropout) if self.dense else nn.Dropout(dropout)

    def local(self, image: Tensor) -> Tensor:
        """(B, bands, H, W) -> (B, spatial_width, H, W), or H - 2 and W - 2 without padding."""
        size = image.shape[2:]
        joint = self.spectral(image.flatten(2)[:, None])  # (B, joint_width, 1, H * W)
        return self.spatial(joint.squeeze(2).unflatten(2, size))


class SSRN(_Layers):
    """Dense SSRN: (B, bands, p, p) -> (B, spatial_width, p, p)."""

    padding = 1


class SSRNPublished(_Layers):
    """SSRN by its own layer table: one feature per patch, for its centre pixel."""

    dense, padding = False, 0

    def forward(self, patches: Tensor) -> Tensor:
        """(B, bands, p, p) -> (B, spatial_width), averaged over the (p - 2) x (p - 2) pixels left."""
        return self.head(self.local(patches).mean((2, 3)))

    def forward_scene(self, image: Tensor) -> Tensor:
        """Not offered: the published form has no feature per pixel. Raises NotImplementedError."""
        raise NotImplementedError("the published form of SSRN reads one pixel per patch")
