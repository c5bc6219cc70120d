"""How a sequence of tokens lies on one or several grids, and the orders in which a scan visits it.

VMamba (arXiv 2401.10166, section 4.2) scans one grid by rows and by columns. GlobalMamba (arXiv 2410.10316)
has a grid per frequency level: a scan then runs over all of them, level after level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which grids a sequence of tokens is made of, in the order of the scan, each grid row by row.

    ``permutation`` and its inverse, (L,) int64, make the scan visit the tokens in another order.
    """

    sizes: tuple[tuple[int, int], ...]
    permutation: Tensor | None = None
    inverse: Tensor | None = None

    def tokens(self, grids: Sequence[Tensor]) -> Tensor:
        """Return grids, each (B, C, h, w), as one sequence (B, L, C)."""
        return joined([grid.permute(0, 2, 3, 1) for grid in grids])

    def grids(self, tokens: Tensor) -> list[Tensor]:
        """Return views (B, C, h, w) of the grids in tokens (B, L, C)."""
        return [grid.permute(0, 3, 1, 2) for grid in split(tokens, self.sizes)]

    def sequences(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L, C) in the order of the scans over rows and over columns."""
        columns = joined([grid.transpose(1, 2) for grid in split(tokens, self.sizes)])
        if self.permutation is None:
            return tokens, columns
        return tokens.index_select(1, self.permutation), columns.index_select(1, self.permutation)

    def merged(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the sum, at each token's own place, of two tensors in the orders of ``sequences``."""
        if self.inverse is not None:
            rows, columns = rows.index_select(1, self.inverse), columns.index_select(1, self.inverse)
        turned = split(columns, [(width, height) for height, width in self.sizes])
        pairs = zip(split(rows, self.sizes), turned, strict=True)
        return joined([row + column.transpose(1, 2) for row, column in pairs])


def split(tokens: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(B, L, C) -> one view (B, h, w, C) per grid."""
    parts = tokens.split([height * width for height, width in sizes], 1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]


def joined(grids: Sequence[Tensor]) -> Tensor:
    """Grids (B, h, w, C) -> (B, L, C), row by row; a view where one grid alone allows it."""
    parts = [grid.flatten(1, 2) for grid in grids]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
