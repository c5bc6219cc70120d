"""Roesser's recurrence by anti-diagonals in plain PyTorch, on every device.

The tokens with i + j = d depend on the diagonal before only, so all of one are computed at once. h1 waits in one
place for each row, h2 in one for each column, the last column first: on a diagonal both are then slices in the same
order, and the place of a token's left neighbour, or of the one above it, becomes its own. The forward keeps the
states before the second and every later chunk of diagonals; the backward goes through the chunks from the last to
the first, computes their states again and runs the adjoint (README.md derives the gradients). Tensors of a diagonal
are (token, batch, D), with states (token, batch, D, N).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DIAGONALS = 8  # of a chunk: what is kept falls with it, what the backward holds for a moment grows


def saved_shape(x: Tensor, A1: Tensor) -> tuple[int, ...]:
    """Return the shape of the states before the second and every later chunk."""
    batch, width, height, columns = x.shape
    chunks = -(-(height + columns - 1) // DIAGONALS)
    return chunks - 1, height + columns, batch, width, A1.shape[1]


def diagonal(grid: Tensor, d: int) -> Tensor:
    """Return the tokens with i + j = d of a contiguous (batch, H, W, C), i rising: a view (token, batch, C)."""
    batch, height, columns, channels = grid.shape
    rows = _span(height, columns, d)[0]
    start = (d + rows.start * (columns - 1)) * channels
    strides = ((columns - 1) * channels, height * columns * channels, 1)
    size = (rows.stop - rows.start, batch, channels)
    return grid.as_strided(size, strides, grid.storage_offset() + start)


def _span(height: int, columns: int, d: int) -> tuple[slice, slice]:
    """Return the places of a diagonal's tokens among the rows, and among the columns from the last to the first."""
    first, last = max(0, d - columns + 1), min(d, height - 1)
    shift = columns - 1 - d
    return slice(first, last + 1), slice(first + shift, last + 1 + shift)


def _channels_last(tensor: Tensor | None) -> Tensor | None:
    """(batch, C, H, W) -> (batch, H, W, C), contiguous; anything else stays."""
    if tensor is None or tensor.dim() == 2:
        return tensor
    return tensor.permute(0, 2, 3, 1).contiguous()


def _outer(x: Tensor, matrix: Tensor | None) -> Tensor:
    """(token, batch, D) times None, (D, N) or (token, batch, N) -> broadcastable to (token, batch, D, N)."""
    if matrix is None:
        return x[..., None]
    return x[..., None] * (matrix if matrix.dim() == 2 else matrix[:, :, None])


def _contract(states: Tensor, matrix: Tensor | None) -> Tensor:
    """(token, batch, D, N) times a matrix as in ``_outer``, summed over the states -> (token, batch, D)."""
    if matrix is None:
        return states.sum(-1)
    if matrix.dim() == 2:
        return torch.einsum("tbdn,dn->tbd", states, matrix)
    return (states @ matrix[..., None]).squeeze(-1)


def _reduce(states: Tensor, x: Tensor, like: Tensor | None) -> Tensor | None:
    """Sum (token, batch, D, N) times (token, batch, D) over what the matrix ``like`` does not have."""
    if like is None:
        return None
    if like.dim() == 2:
        return torch.einsum("tbdn,tbd->dn", states, x)
    return (x[:, :, None] @ states).squeeze(2)


@dataclass(frozen=True)
class Wave:
    """One diagonal: its inputs by name, and what the recurrence makes of them."""

    inputs: dict[str, Tensor | None]
    left: Tensor  # h1[i,j-1]
    above: Tensor  # h2[i-1,j]
    decay1: Tensor
    decay4: Tensor
    s2: Tensor  # <q2, h2[i-1,j]>
    s3: Tensor  # <q3, h1[i,j]>
    h1: Tensor
    h2: Tensor


def _wave(inputs: dict[str, Tensor | None], d: int, left: Tensor, above: Tensor) -> Wave:
    """Compute a diagonal from the states that wait in its places."""
    on_wave = {k: t if t is None or t.dim() == 2 else diagonal(t, d) for k, t in inputs.items()}
    x, delta1, delta2 = (on_wave[name] for name in ("x", "delta1", "delta2"))
    decay1 = (delta1[..., None] * on_wave["A1"]).exp_()
    decay4 = (delta2[..., None] * on_wave["A4"]).exp_()
    s2 = _contract(above, on_wave["q2"])
    h1 = decay1 * left
    h1 += _outer(delta1 * s2, on_wave["p2"])
    h1 += _outer(delta1 * x, on_wave["B1"])
    s3 = _contract(h1, on_wave["q3"])
    h2 = decay4 * above
    h2 += _outer(delta2 * s3, on_wave["p3"])
    h2 += _outer(delta2 * x, on_wave["B2"])
    return Wave(on_wave, left, above, decay1, decay4, s2, s3, h1, h2)


def forward(inputs: dict[str, Tensor | None], keep: bool) -> tuple[Tensor, Tensor]:
    """Return y and, if ``keep``, the states before the later chunks; all inputs are of one type."""
    shape = inputs["x"].shape
    saved = inputs["A1"].new_empty(saved_shape(inputs["x"], inputs["A1"]) if keep else (0,))
    inputs = {name: _channels_last(tensor) for name, tensor in inputs.items()}
    y = torch.empty_like(inputs["x"])
    h1, h2 = _places(inputs)
    for d in range(sum(shape[2:]) - 1):
        if keep and d and d % DIAGONALS == 0:
            torch.cat([h1, h2], out=saved[d // DIAGONALS - 1])
        rows, columns = _span(*shape[2:], d)
        wave = _wave(inputs, d, h1[rows], h2[columns])
        h1[rows], h2[columns] = wave.h1, wave.h2
        outputs = (_contract(h, wave.inputs[C]) for h, C in ((wave.h1, "C1"), (wave.h2, "C2")))
        torch.add(*outputs, out=diagonal(y, d))
    return y.permute(0, 3, 1, 2), saved


def _places(inputs: dict[str, Tensor | None]) -> list[Tensor]:
    """Return zeros for a state of each row and of each column; ``x`` is (batch, H, W, D)."""
    batch, *grid, width = inputs["x"].shape
    return [inputs["x"].new_zeros(count, batch, width, inputs["A1"].shape[1]) for count in grid]


def backward(dy: Tensor, inputs: dict[str, Tensor | None], saved: Tensor) -> list[Tensor | None]:
    """Return the gradients to the inputs, in their order; None where there is no input."""
    height, columns = dy.shape[2:]
    dy = _channels_last(dy)
    inputs = {name: _channels_last(tensor) for name, tensor in inputs.items()}
    totals = {
        name: None if t is None else torch.zeros_like(t) if t.dim() == 2 else torch.empty_like(t)
        for name, t in inputs.items()
    }
    carries = _places(inputs)
    for start in reversed(range(0, height + columns - 1, DIAGONALS)):
        states = saved[start // DIAGONALS - 1].split([height, columns]) if start else _places(inputs)
        states = [state.clone() for state in states]
        for d, wave in reversed(_chunk(inputs, start, *states)):
            places = _span(height, columns, d)
            for name, value in _gradients(wave, diagonal(dy, d), *carries, *places).items():
                total = totals[name]
                if total is None:
                    continue
                if total.dim() == 2:
                    total += value
                else:
                    diagonal(total, d).copy_(value)
    return [t if t is None or t.dim() == 2 else t.permute(0, 3, 1, 2) for t in totals.values()]


def _chunk(inputs, start: int, h1: Tensor, h2: Tensor) -> list[tuple[int, Wave]]:
    """Compute the diagonals of a chunk again from the states before it, which are overwritten."""
    height, columns = len(h1), len(h2)
    waves = []
    for d in range(start, min(start + DIAGONALS, height + columns - 1)):
        rows, places = _span(height, columns, d)
        wave = _wave(inputs, d, h1[rows].clone(), h2[places].clone())
        h1[rows], h2[places] = wave.h1, wave.h2
        waves.append((d, wave))
    return waves


def _gradients(wave: Wave, dy, carry1, carry2, rows: slice, columns: slice) -> dict[str, Tensor | None]:
    """Return a diagonal's gradients by name, and put into the carries what it hands to the diagonal before."""
    on_wave = wave.inputs
    x, delta1, delta2 = (on_wave[name] for name in ("x", "delta1", "delta2"))
    g2 = carry2[columns] + _outer(dy, on_wave["C2"])
    along3 = _contract(g2, on_wave["p3"])
    t3 = delta2 * along3  # the gradient to s3
    g1 = carry1[rows] + _outer(dy, on_wave["C1"])
    g1 += _outer(t3, on_wave["q3"])
    along2 = _contract(g1, on_wave["p2"])
    t2 = delta1 * along2
    hand1, hand2 = wave.decay1 * g1, wave.decay4 * g2
    e1, e4 = hand1 * wave.left, hand2 * wave.above  # the gradients to the exponents
    carry1[rows] = hand1
    carry2[columns] = hand2.add_(_outer(t2, on_wave["q2"]))
    driven1, driven2 = _contract(g1, on_wave["B1"]), _contract(g2, on_wave["B2"])
    return {
        "x": delta1 * driven1 + delta2 * driven2,
        "delta1": _contract(e1, on_wave["A1"]) + along2 * wave.s2 + driven1 * x,
        "delta2": _contract(e4, on_wave["A4"]) + along3 * wave.s3 + driven2 * x,
        "A1": _reduce(e1, delta1, on_wave["A1"]),
        "A4": _reduce(e4, delta2, on_wave["A4"]),
        "p2": _reduce(g1, delta1 * wave.s2, on_wave["p2"]),
        "q2": _reduce(wave.above, t2, on_wave["q2"]),
        "p3": _reduce(g2, delta2 * wave.s3, on_wave["p3"]),
        "q3": _reduce(wave.h1, t3, on_wave["q3"]),
        "B1": _reduce(g1, delta1 * x, on_wave["B1"]),
        "B2": _reduce(g2, delta2 * x, on_wave["B2"]),
        "C1": _reduce(wave.h1, dy, on_wave["C1"]),
        "C2": _reduce(wave.h2, dy, on_wave["C2"]),
    }
