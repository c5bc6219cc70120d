"""Roesser's recurrence by anti-diagonals in plain PyTorch, on every device.

The tokens with i + j = d depend on the diagonal before only, so all of one are computed at once. h1 waits in one
place for each row, h2 in one for each column, in one tensor: the columns from the last to the first, a place that
stays zero for what lies outside the grid, the rows. A diagonal's own places are then one slice of each kind, which
held h1 of the left neighbours and h2 of the upper ones; the same slices moved by one towards the zero hold h2 of the
left neighbours and h1 of the upper ones. The forward keeps all places before the second and every later chunk of
diagonals; the backward goes through the chunks from the last to the first, computes their states again and runs the
adjoint (README.md derives the gradients). Tensors of a diagonal are (token, batch, D), with states
(token, batch, D, N).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DIAGONALS = 8  # of a chunk: what is kept falls with it, what the backward holds for a moment grows


def saved_shape(x: Tensor, A1: Tensor) -> tuple[int, ...]:
    """Return the shape of the places before the second and every later chunk."""
    batch, width, height, columns = x.shape
    chunks = -(-(height + columns - 1) // DIAGONALS)
    return chunks - 1, height + 1 + columns, batch, width, A1.shape[1]


def diagonal(grid: Tensor, d: int) -> Tensor:
    """Return the tokens with i + j = d of a contiguous (batch, H, W, C), i rising: a view (token, batch, C)."""
    batch, height, columns, channels = grid.shape
    first, last = _rows(height, columns, d)
    start = (d + first * (columns - 1)) * channels
    strides = ((columns - 1) * channels, height * columns * channels, 1)
    size = (last + 1 - first, batch, channels)
    return grid.as_strided(size, strides, grid.storage_offset() + start)


def _rows(height: int, columns: int, d: int) -> tuple[int, int]:
    """Return the first and the last row of a diagonal's tokens."""
    return max(0, d - columns + 1), min(d, height - 1)


@dataclass(frozen=True)
class Places:
    """Where a diagonal's tokens find the states of their neighbours, and leave their own; i rising in each."""

    left1: slice  # h1[i,j-1], and then h1[i,j]
    left2: slice  # h2[i,j-1]
    above1: slice  # h1[i-1,j]
    above2: slice  # h2[i-1,j], and then h2[i,j]


def _places(height: int, columns: int, d: int) -> Places:
    """Return a diagonal's places: column j is at columns - 1 - j, what lies outside at columns, row i behind it."""
    first, last = _rows(height, columns, d)
    row, column = columns + 1, columns - 1 - d  # of i = 0, and of j = d - i at i = 0
    return Places(
        left1=slice(row + first, row + last + 1),
        left2=slice(column + first + 1, column + last + 2),
        above1=slice(row + first - 1, row + last),
        above2=slice(column + first, column + last + 1),
    )


def _channels_last(tensor: Tensor | None) -> Tensor | None:
    """(batch, C, H, W) -> (batch, H, W, C), contiguous; anything else stays."""
    if tensor is None or tensor.dim() == 2:
        return tensor
    return tensor.permute(0, 2, 3, 1).contiguous()


def _add_outer(states: Tensor, x: Tensor, matrix: Tensor | None) -> Tensor:
    """Add (token, batch, D) times None, (D, N) or (token, batch, N) to states (token, batch, D, N), in their place."""
    if matrix is None:
        return states.add_(x[..., None])
    return states.addcmul_(x[..., None], matrix if matrix.dim() == 2 else matrix[:, :, None])


def _contract(states: Tensor, matrix: Tensor | None) -> Tensor:
    """(token, batch, D, N) times a matrix as in ``_add_outer``, summed over the states -> (token, batch, D)."""
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
class Neighbours:
    """What a diagonal's tokens read: both states of the left neighbour and of the upper one, (token, batch, D, N)."""

    left1: Tensor
    left2: Tensor
    above1: Tensor
    above2: Tensor


@dataclass(frozen=True)
class Wave:
    """One diagonal: its inputs by name, its neighbours' states, and what the recurrence makes of them.

    Where ``h1`` and ``h2`` were computed in the place of what was read, ``before`` no longer holds that.
    """

    inputs: dict[str, Tensor | None]
    before: Neighbours
    decay1: Tensor
    decay4: Tensor
    s2: Tensor  # <q2, h2[i,j-1]>
    s3: Tensor  # <q3, h1[i-1,j]>
    h1: Tensor
    h2: Tensor


def _wave(
    inputs: dict[str, Tensor | None], d: int, before: Neighbours, own: tuple[Tensor | None, Tensor | None]
) -> Wave:
    """Compute a diagonal from the states of its neighbours, into ``own`` or new memory.

    ``own`` may be what ``before`` holds of h1 of the left and of h2 of the upper neighbours: both numbers that couple
    are taken before anything is written.
    """
    on_wave = {k: t if t is None or t.dim() == 2 else diagonal(t, d) for k, t in inputs.items()}
    x, delta1, delta2 = (on_wave[name] for name in ("x", "delta1", "delta2"))
    decay1 = (delta1[..., None] * on_wave["A1"]).exp_()
    decay4 = (delta2[..., None] * on_wave["A4"]).exp_()
    s2 = _contract(before.left2, on_wave["q2"])
    s3 = _contract(before.above1, on_wave["q3"])
    h1 = torch.mul(decay1, before.left1, out=own[0])
    _add_outer(_add_outer(h1, delta1 * s2, on_wave["p2"]), delta1 * x, on_wave["B1"])
    h2 = torch.mul(decay4, before.above2, out=own[1])
    _add_outer(_add_outer(h2, delta2 * s3, on_wave["p3"]), delta2 * x, on_wave["B2"])
    return Wave(on_wave, before, decay1, decay4, s2, s3, h1, h2)


def forward(inputs: dict[str, Tensor | None], keep: bool) -> tuple[Tensor, Tensor]:
    """Return y and, if ``keep``, the places before the later chunks; all inputs are of one type."""
    grid = inputs["x"].shape[2:]
    saved = inputs["A1"].new_empty(saved_shape(inputs["x"], inputs["A1"]) if keep else (0,))
    inputs = {name: _channels_last(tensor) for name, tensor in inputs.items()}
    y = torch.empty_like(inputs["x"])
    states = _outside(inputs)
    for d in range(sum(grid) - 1):
        if keep and d and d % DIAGONALS == 0:
            saved[d // DIAGONALS - 1] = states
        wave = _advance(inputs, d, states, _places(*grid, d))
        outputs = (_contract(h, wave.inputs[C]) for h, C in ((wave.h1, "C1"), (wave.h2, "C2")))
        torch.add(*outputs, out=diagonal(y, d))
    return y.permute(0, 3, 1, 2), saved


def _outside(inputs: dict[str, Tensor | None]) -> Tensor:
    """Return zeros for every place, (W + 1 + H, batch, D, N); ``x`` is (batch, H, W, D)."""
    batch, height, columns, width = inputs["x"].shape
    return inputs["x"].new_zeros(columns + 1 + height, batch, width, inputs["A1"].shape[1])


def _advance(inputs, d: int, states: Tensor, at: Places, clone: bool = False) -> Wave:
    """Compute a diagonal from the states and leave its own there; ``clone`` keeps what it read from being lost.

    Without ``clone`` the diagonal's states are computed where they stay, and what was read is gone.
    """
    # The two slices of a kind overlap in all but one place: one copy serves both.
    rows = states[at.above1.start : at.left1.stop]
    columns = states[at.above2.start : at.left2.stop]
    own = (states[at.left1], states[at.above2])
    if clone:
        rows, columns, own = rows.clone(), columns.clone(), (None, None)
    before = Neighbours(left1=rows[1:], left2=columns[1:], above1=rows[:-1], above2=columns[:-1])
    wave = _wave(inputs, d, before, own)
    if clone:
        states[at.left1], states[at.above2] = wave.h1, wave.h2
    return wave


def backward(dy: Tensor, inputs: dict[str, Tensor | None], saved: Tensor) -> list[Tensor | None]:
    """Return the gradients to the inputs, in their order; None where there is no input."""
    grid = dy.shape[2:]
    dy = _channels_last(dy)
    inputs = {name: _channels_last(tensor) for name, tensor in inputs.items()}
    totals = {
        name: None if t is None else torch.zeros_like(t) if t.dim() == 2 else torch.empty_like(t)
        for name, t in inputs.items()
    }
    carry = _outside(inputs)  # the gradient to the state that waits in each place, as far as it is known
    for start in reversed(range(0, sum(grid) - 1, DIAGONALS)):
        states = saved[start // DIAGONALS - 1].clone() if start else _outside(inputs)
        chunk = range(start, min(start + DIAGONALS, sum(grid) - 1))
        waves = [_advance(inputs, d, states, _places(*grid, d), clone=True) for d in chunk]
        for d, wave in zip(reversed(chunk), reversed(waves), strict=True):
            for name, value in _gradients(wave, diagonal(dy, d), carry, _places(*grid, d)).items():
                total = totals[name]
                if total is None:
                    continue
                if total.dim() == 2:
                    total += value
                else:
                    diagonal(total, d).copy_(value)
    return [t if t is None or t.dim() == 2 else t.permute(0, 3, 1, 2) for t in totals.values()]


def _gradients(wave: Wave, dy: Tensor, carry: Tensor, at: Places) -> dict[str, Tensor | None]:
    """Return a diagonal's gradients by name, and put into the carry what it hands to the diagonal before."""
    on_wave, before = wave.inputs, wave.before
    x, delta1, delta2 = (on_wave[name] for name in ("x", "delta1", "delta2"))
    g1 = _add_outer(carry[at.left1].clone(), dy, on_wave["C1"])
    g2 = _add_outer(carry[at.above2].clone(), dy, on_wave["C2"])
    along2, along3 = _contract(g1, on_wave["p2"]), _contract(g2, on_wave["p3"])
    t2, t3 = delta1 * along2, delta2 * along3  # the gradients to s2 and s3
    # First both that replace, then both that add: a state goes on along its own line and into the other's.
    hand1 = torch.mul(wave.decay1, g1, out=carry[at.left1])
    hand2 = torch.mul(wave.decay4, g2, out=carry[at.above2])
    e1, e4 = hand1 * before.left1, hand2 * before.above2  # the gradients to the exponents
    _add_outer(carry[at.left2], t2, on_wave["q2"])
    _add_outer(carry[at.above1], t3, on_wave["q3"])
    driven1, driven2 = _contract(g1, on_wave["B1"]), _contract(g2, on_wave["B2"])
    return {
        "x": delta1 * driven1 + delta2 * driven2,
        "delta1": _contract(e1, on_wave["A1"]) + along2 * wave.s2 + driven1 * x,
        "delta2": _contract(e4, on_wave["A4"]) + along3 * wave.s3 + driven2 * x,
        "A1": _reduce(e1, delta1, on_wave["A1"]),
        "A4": _reduce(e4, delta2, on_wave["A4"]),
        "p2": _reduce(g1, delta1 * wave.s2, on_wave["p2"]),
        "q2": _reduce(before.left2, t2, on_wave["q2"]),
        "p3": _reduce(g2, delta2 * wave.s3, on_wave["p3"]),
        "q3": _reduce(before.above1, t3, on_wave["q3"]),
        "B1": _reduce(g1, delta1 * x, on_wave["B1"]),
        "B2": _reduce(g2, delta2 * x, on_wave["B2"]),
        "C1": _reduce(wave.h1, dy, on_wave["C1"]),
        "C2": _reduce(wave.h2, dy, on_wave["C2"]),
    }
