"""Class tokens of a plane: a row and a column of them, crossing in the one that the head reads.

V2M (arXiv 2410.10382) compares class tokens at the edge and in the middle with the mean over all tokens. A plane has
no place for a single one. Its release holds both forms, switched off: P + P + 1 tokens, each a parameter, enter a
P x P grid as a further row and a further column, which makes it (P + 1) x (P + 1), and the head reads the token where
they cross, the last one (edge) or the one at P // 2 (middle). Of the middle form its lines are off for an even P, where
the column is cut at a place that is no multiple of its length; here it stands straight.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def insert_cross(grid: Tensor, cross: Tensor, row: int, column: int) -> Tensor:
    """(B, H, W, E) and (1, W + H + 1, E), first the row's W tokens, then the column's -> (B, H + 1, W + 1, E)."""
    height, width = grid.shape[1:3]
    cross = cross.expand(len(grid), -1, -1)
    line, pillar = cross[:, None, :width], cross[:, width:, None]
    grid = torch.cat([grid[:, :row], line, grid[:, row:]], 1)
    return torch.cat([grid[:, :, :column], pillar, grid[:, :, column:]], 2)


def split_cross(grid: Tensor, row: int, column: int) -> tuple[Tensor, Tensor]:
    """Undo ``insert_cross``: (B, H + 1, W + 1, E) -> (B, H, W, E) and (B, W + H + 1, E)."""
    pillar = grid[:, :, column]
    grid = torch.cat([grid[:, :, :column], grid[:, :, column + 1 :]], 2)
    line = grid[:, row]
    return torch.cat([grid[:, :row], grid[:, row + 1 :]], 1), torch.cat([line, pillar], 1)


def resize_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, E) -> (B, *size, E), bicubic."""
    images = grid.float().permute(0, 3, 1, 2)
    resized = F.interpolate(images, size, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(grid.dtype)


def resize_cross(cross: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(B, W + H + 1, E) of a grid ``old`` (H, W) -> that of a grid ``new``: each line stretched along itself."""
    lines = cross.split([old[1], old[0] + 1], 1)
    lengths = (new[1], new[0] + 1)
    resized = [
        F.interpolate(line.float().transpose(1, 2), length, mode="linear", align_corners=True).transpose(1, 2)
        for line, length in zip(lines, lengths, strict=True)
    ]
    return torch.cat(resized, 1).to(cross.dtype)
