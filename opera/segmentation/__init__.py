"""Backbones of FCN and UPerNet (trained by ``shared/dense``): ResNets by their stages, ViTs by their blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opera.detection import resnet_maps
from shared.dense.model import Padded


class Blocks(nn.Module):
    """Images (B, 3, H, W) -> the patch tokens (B, C, h, w) behind ``blocks`` of a ViT, as in mmseg without a last norm.

    Positions are those of the pre-training, resized bicubically for another grid.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[int]):
        super().__init__()
        self.network, self.blocks, self.grid = network, tuple(blocks), network.patch_embed.grid_size
        network.norm = nn.Identity()  # of the class token's answer, which nobody asks for here
        network.requires_grad_(True)  # with what a pre-training froze, as in tuning

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Return the positions (1, 1 + h w, C) of the class token and of a grid of patches."""
        own = self.network.pos_embed
        if size == self.grid:
            return own
        patches = own[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        resized = F.interpolate(patches, size, mode="bicubic", align_corners=False)
        return torch.cat([own[:, :1], resized.flatten(2).transpose(1, 2)], 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        network, grid = self.network, self.network.patch_embed.proj(images)
        size = tuple(grid.shape[2:])
        tokens = torch.cat([network.cls_token.expand(len(grid), -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        tokens, maps = network.pos_drop(tokens + self.positions(size)), []
        for number, block in enumerate(network.blocks):
            tokens = block(tokens)
            if number in self.blocks:
                maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, size))
        return maps


def vit_maps(network: nn.Module, blocks: Sequence[int]) -> Padded:
    """Return a ViT as a backbone for images of any size: maps of one grid, which mmseg's neck brings to four sizes."""
    patch, count = network.patch_embed.patch_size[0], len(blocks)
    return Padded(Blocks(network, blocks), patch, [network.num_features] * count, [patch] * count)


__all__ = ["resnet_maps", "vit_maps"]
