"""A grid of tokens cut into square windows, each a small grid of its own, and back (LocalMamba, arXiv 2403.09338)."""

from torch import Tensor
from torch.nn import functional as F


def to_windows(grid: Tensor, side: int) -> Tensor:
    """(B, H, W, E) -> (B windows, side, side, E), windows in raster order; zeros fill the last ones."""
    batch, height, width, channels = grid.shape
    grid = F.pad(grid, (0, 0, 0, -width % side, 0, -height % side))
    tiles = grid.unflatten(1, (-1, side)).unflatten(3, (-1, side))  # (B, rows, side, columns, side, E)
    return tiles.transpose(2, 3).reshape(-1, side, side, channels)


def from_windows(windows: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Undo ``to_windows`` for a grid of ``size`` (H, W)."""
    height, width = size
    rows, columns = -(-height // side), -(-width // side)
    tiles = windows.reshape(-1, rows, columns, side, side, windows.shape[-1])
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
