"""HybridSN: 3-D convolutions, then 2-D, in a dense form.

S. K. Roy, G. Krishna, S. R. Dubey, B. B. Chaudhuri, IEEE GRSL 17(2), 2020,
https://doi.org/10.1109/LGRS.2019.2918719. Layer table (3 x 3 in space): 8 kernels of spectral length 7,
16 of length 5, 32 of length 3, reshape, 64 2-D kernels 3 x 3, fully connected 256 and 128, each followed by
dropout 0.4; ReLU throughout and no batch normalisation.

The dense form departs in two points: the 3 x 3 kernels are zero-padded in space (not along the spectrum), so
that every pixel keeps a feature; and the two fully connected layers, which in the paper read the flattened
patch, are 1 x 1 convolutions behind a layer that adds the patch mean to every pixel. Their dropout leaves
out a unit for the whole patch, as it does in the paper.

Layout: reshape and 2-D kernel are written as one 3-D kernel over the whole remaining spectral axis, the same
linear map without a copy; channels-last memory is a quarter faster on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdml.backbones.context import Backbone, GlobalContext


class HybridSN(Backbone):
    """Dense HybridSN: (B, bands, p, p) -> (B, dense_widths[-1], p, p)."""

    def __init__(
        self,
        bands: int,
        patch_size: int,
        spectral_widths: list[int],
        spectral_kernels: list[int],
        spatial_width: int,
        dense_widths: list[int],
        dropout: float,
    ):
        length = bands - sum(spectral_kernels) + len(spectral_kernels)
        super().__init__(
            bands, patch_size, dense_widths[-1], fewest_bands=bands - length + 1, reach=len(spectral_widths) + 1
        )
        self.spectral = nn.ModuleList()
        before = 1
        for width, kernel in zip(spectral_widths, spectral_kernels, strict=True):
            self.spectral.append(nn.Conv3d(before, width, (kernel, 3, 3), padding=(0, 1, 1)))
            before = width
        self.spatial = nn.Conv3d(before, spatial_width, (length, 3, 3), padding=(0, 1, 1))
        self.context = GlobalContext(spatial_width)
        layers: list[nn.Module] = []
        before = spatial_width
        for width in dense_widths:
            layers += [nn.Conv2d(before, width, 1), nn.ReLU(inplace=True), nn.Dropout2d(dropout)]
            before = width
        self.head = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.spectral.to(memory_format=torch.channels_last_3d)
        self.spatial.to(memory_format=torch.channels_last_3d)

    def local(self, image: Tensor) -> Tensor:
        """(B, bands, H, W) -> (B, spatial_width, H, W)."""
        x = image[:, None]
        for conv in self.spectral:
            x = F.relu(conv(x), inplace=True)
        return F.relu(self.spatial(x).squeeze(2), inplace=True)
