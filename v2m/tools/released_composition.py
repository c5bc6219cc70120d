"""``ReleasedMixer`` as the released code moves its data: what benchmarks hold the mixers of the plane against.

Four copies of the tokens, ``in_proj`` on each, sequences made by flattening, a permuted copy of features and gate
between the passes, flips and permuted copies behind them. The result is that of ``ReleasedMixer``, which scans the
grids where they lie.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from v2m.mixer import FIRST, SECOND, ReleasedMixer


def released_composition(mixer: ReleasedMixer, grid: Tensor, sequence_pass: Callable | None = None) -> Tensor:
    """(B, P, P, E) -> (B, P, P, E) with the parameters of ``mixer``.

    ``sequence_pass`` makes a pass over sequences where it is not ours: it takes the mixer, x (M, L, D), the suffix of
    the parameters and which of B and C is chosen, and returns (M, L, D), the skip added.
    """
    one_pass = sequence_pass or _sequence_pass
    batch, side = grid.shape[:2]
    rows = grid.flatten(0, 1)  # (B P, P, E)
    columns = grid.transpose(1, 2).flatten(0, 1)
    copies = torch.cat([rows, columns, rows.flip(1), columns.flip(1)])
    x, gate = mixer.in_proj(copies).chunk(2, -1)
    passed = one_pass(mixer, x, FIRST, "B") * F.silu(gate)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, side, side, tensor.shape[-1]).permute(0, 2, 1, 3)

    both = turned(torch.cat([passed, gate], -1)).flatten(0, 1)
    passed, gate = both.chunk(2, -1)
    passed = one_pass(mixer, passed, SECOND, "C") * F.silu(gate)
    ahead, down, back, up = passed.reshape(-1, side, side, passed.shape[-1]).chunk(4)
    ahead = ahead.reshape(batch, side * side, -1) + down.permute(0, 2, 1, 3).reshape(batch, side * side, -1)
    back = back.reshape(batch, side * side, -1) + up.permute(0, 2, 1, 3).reshape(batch, side * side, -1)
    return mixer.out_proj((ahead + back.flip(1)) / 2).unflatten(1, (side, side))


def _sequence_pass(mixer: ReleasedMixer, x: Tensor, suffix: str, chosen: str) -> Tensor:
    """(M, L, D) -> (M, L, D): a pass over sequences, each a grid of one row."""
    return mixer.run_pass(x.contiguous()[:, None, None], ("right",), (suffix,), chosen)[:, 0, 0]
