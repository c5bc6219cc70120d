"""Roesser's recurrence by its definition, one token after the other: the judge of the other backend.

h1[i,j] = exp(delta1 A1) h1[i,j-1] + A2 h2[i,j-1] + delta1 B1 x,    A2 = delta1 p2 q2^T
h2[i,j] = exp(delta2 A4) h2[i-1,j] + A3 h1[i-1,j] + delta2 B2 x,    A3 = delta2 p3 q3^T
y[i,j]  = <C1, h1[i,j]> + <C2, h2[i,j]>,                            h1 and h2 zero outside the grid

So h1 reads both states of the left neighbour, h2 both of the upper one, as V2M's figure draws it (motivation.png of
github.com/wangck20/V2M).
"""

import torch
from torch import Tensor

MATRICES = ("p2", "q2", "p3", "q3", "B1", "B2", "C1", "C2")
NAMES = ("x", "delta1", "delta2", "A1", "A4", *MATRICES)


def scan(inputs: dict[str, Tensor | None]) -> Tensor:
    """Return y (batch, D, H, W), differentiable; the arguments are those of ``roesser_scan``, all of one type."""
    x, A1, A4 = (inputs[name] for name in ("x", "A1", "A4"))
    nothing = x.new_zeros(*x.shape[:2], A1.shape[1])  # (batch, D, N)
    above, rows = [(nothing, nothing)] * x.shape[3], []  # h1 and h2 of the row above
    for i in range(x.shape[2]):
        left, row = (nothing, nothing), []
        for j, upper in enumerate(above):
            token, delta1, delta2 = (inputs[name][:, :, i, j, None] for name in ("x", "delta1", "delta2"))
            p2, q2, p3, q3, B1, B2, C1, C2 = (_at(inputs[name], i, j) for name in MATRICES)
            coupled = p2 * (q2 * left[1]).sum(-1, keepdim=True)
            h1 = torch.exp(delta1 * A1) * left[0] + delta1 * (coupled + B1 * token)
            coupled = p3 * (q3 * upper[0]).sum(-1, keepdim=True)
            h2 = torch.exp(delta2 * A4) * upper[1] + delta2 * (coupled + B2 * token)
            left = above[j] = h1, h2
            row.append((C1 * h1 + C2 * h2).sum(-1))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def _at(matrix: Tensor | None, i: int, j: int) -> Tensor | float:
    """Return a vector of one token, broadcastable to (batch, D, N)."""
    if matrix is None:
        return 1.0
    return matrix if matrix.dim() == 2 else matrix[:, None, :, i, j]
