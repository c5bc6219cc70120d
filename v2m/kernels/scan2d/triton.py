"""The scan of a grid on NVIDIA GPUs: what is launched, and the sums over what the programs leave behind.

The kernels are in `triton_forward.py` and `triton_backward.py`; README.md derives them. Everything is deterministic:
programs write rows of partial sums, and the rows are added here in a fixed order.

Triton is imported where it is used, so this file can be read on a machine without it. With TRITON_INTERPRET=1 in the
environment the same code runs on the CPU, slowly, through Triton's interpreter.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from v2m.kernels.scan2d.op import empty_grid
from v2m.kernels.scan2d.reference import DIRECTIONS, by_axis, returned, turned

STEPS = 4  # unrolled: their loads are in flight together, more would not leave registers for other programs
WARP = 32
# Thread blocks that fill a large GPU: below it the lines of a group are shared by several, and a program takes fewer
# channels, where it may.
ENOUGH_PROGRAMS = 2048
MAX_GROUPS = 31  # two bits each in an int64


def unavailable() -> str:
    """Return why this backend cannot run here, in one sentence; empty where it can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed (`pip install triton`, Linux only)."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not torch.cuda.is_available():
        return "no GPU is visible to PyTorch (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)."
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0."
    return ""


def saved_shape(u: Tensor, A: Tensor, B, C, directions: tuple[str, ...]) -> tuple[int, ...]:
    """Return the shape of the states that the forward keeps, as ``Launch`` cuts the work."""
    plan = Launch.of(u, A, directions)
    return plan.batch, plan.spots, *plan.tiles


@dataclass(frozen=True)
class Launch:
    """How a scan is cut into programs: one batch element, block of channels and share of the lines each."""

    batch: int
    groups: int
    width: int
    height: int
    columns: int
    state: int
    padded: int  # state, up to a power of two
    channels: int  # of a program
    blocks: int  # programs for one group
    splits: int  # shares of the lines
    spots: int  # for kept states, of a group
    names: tuple[str, ...]

    @classmethod
    def of(cls, u: Tensor, A: Tensor, directions: tuple[str, ...]) -> "Launch":
        """Plan for checked arguments (see `op.py`). Raises ValueError for more than 31 groups."""
        batch, groups, width, height, columns = u.shape
        if groups > MAX_GROUPS:
            raise ValueError(f"the triton backend takes at most {MAX_GROUPS} groups, got {groups}")
        padded = _power_of_two(A.shape[2])
        channels = _channels(padded, width, batch * groups * width)
        blocks = -(-width // channels)
        lines = {axis: (height if axis == -1 else columns) for axis, _, _ in by_axis(directions)}
        wanted = -(-ENOUGH_PROGRAMS // (batch * groups * blocks))
        return cls(
            batch=batch,
            groups=groups,
            width=width,
            height=height,
            columns=columns,
            state=A.shape[2],
            padded=padded,
            channels=channels,
            blocks=blocks,
            splits=max(1, min(wanted, *lines.values())),
            spots=max(count * _parts(height * columns // count) for count in lines.values()),
            names=directions,
        )

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * self.splits * self.groups * self.blocks,)

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Shape of what belongs to a channel and a state, as the kernels read and write it."""
        return self.groups * self.blocks, self.padded, self.channels

    def arguments(self, u: Tensor, B: Tensor | None, C: Tensor | None) -> dict:
        """What both kernels take beside tensors."""
        codes = [2 * (axis == -2) + back for axis, back in (DIRECTIONS[name] for name in self.names)]
        return {
            "u_batch": u.stride(0),
            "u_group": u.stride(1),
            "width": self.width,
            "height": self.height,
            "columns": self.columns,
            "spots": self.spots,
            "opaque": 0,
            "groups": self.groups,
            "blocks": self.blocks,
            "splits": self.splits,
            "directions": sum(code << 2 * group for group, code in enumerate(codes)),
            "PADDED": self.padded,
            "CHANNELS": self.channels,
            "STEPS": STEPS,
            "KIND_B": _kind(B),
            "KIND_C": _kind(C),
            "EVEN": self.width % self.channels == 0,
            "num_warps": 1,
            "num_stages": 1,  # Triton's own pipelining would move the loads through shared memory
        }

    def matrices(self, A: Tensor, B: Tensor | None, C: Tensor | None) -> list[Tensor]:
        """Return all three packed; A stands for a constant one, whose memory is never read."""
        tiles = self.packed(A, A.dtype)
        return [tiles, *(tiles if matrix is None else self.packed(matrix, A.dtype) for matrix in (B, C))]

    def packed(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """(K, D, N) -> tiles; B or C of every token -> (batch, K, H W, padded), tokens in the order of the scan.

        A token's row is then contiguous and needs no conversion: every program of its group reads it.
        """
        if matrix.dim() == 3:
            short = self.blocks * self.channels - self.width
            rows = F.pad(matrix.to(dtype), (0, self.padded - self.state, 0, short))
            return rows.reshape(-1, self.channels, self.padded).transpose(1, 2).contiguous()
        size = (self.batch, self.groups, self.height * self.columns, self.padded)
        rows = matrix.new_zeros(size, dtype=dtype)
        for axis, groups, back in by_axis(self.names):
            lines = turned(matrix[:, groups], axis, back)  # (batch, ., N, lines, steps)
            rows[:, groups, :, : self.state] = lines.flatten(3).transpose(2, 3).to(dtype)
        return rows

    def unpacked(self, tiles: Tensor) -> Tensor:
        """Tiles -> (K, D, N)."""
        rows = tiles.transpose(1, 2).reshape(self.groups, -1, self.padded)
        return rows[:, : self.width, : self.state]

    def partial(self, like: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return memory for what the programs leave of the gradient to B or C."""
        if like is None:
            return None
        if like.dim() == 3:
            return like.new_empty(self.batch * self.splits, *self.tiles, dtype=dtype)
        rows = (self.batch, self.groups, self.blocks, self.height * self.columns, self.padded)
        return like.new_empty(rows, dtype=dtype)

    def add(self, parts: Tensor | None, like: Tensor | None) -> Tensor | None:
        """Return the gradient to B or C, shaped as it is, from what ``partial`` holds."""
        if like is None:
            return None
        gradient = like.new_empty(like.shape)
        if like.dim() == 3:
            return gradient.copy_(self.unpacked(parts.sum(0)))
        rows = parts.sum(2)[..., : self.state].transpose(2, 3)  # (batch, K, N, tokens)
        for axis, groups, back in by_axis(self.names):
            steps = self.columns if axis == -1 else self.height
            gradient[:, groups] = returned(rows[:, groups].unflatten(3, (-1, steps)), axis, back).to(like.dtype)
        return gradient


def _parts(length: int) -> int:
    """Return how many states of a line are kept: see `triton_forward.scan_forward`."""
    shorter = bin(length % STEPS).count("1")
    return max((length // STEPS - 1) // 2, 0) + shorter


def _kind(matrix: Tensor | None) -> int:
    return 0 if matrix is None else 1 if matrix.dim() == 3 else 2


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _channels(padded: int, width: int, rows: int) -> int:
    """Channels of a program, a power of two; `rows` is batch x groups x width.

    16 states a thread, so that N <= 16 needs no exchange between threads. One state leaves room for several channels
    a thread, which makes loads wider, where that still gives every multiprocessor enough programs.
    """
    channels = min(WARP, 16 * WARP // padded)
    if padded == 1:
        while channels < 4 * WARP and rows // (2 * channels) >= ENOUGH_PROGRAMS:
            channels *= 2
    return min(channels, _power_of_two(width))


def state_blocks(padded: int) -> int:
    """Into how many tiles the backward divides the states, so that those of a chunk fit into the registers."""
    return 2 if padded >= 16 else 1


def _dense(grid: Tensor) -> Tensor:
    """Return a grid channels last and dense, copied where it is not."""
    return grid if grid.permute(0, 1, 3, 4, 2).is_contiguous() else empty_grid(grid).copy_(grid)


def _readable(u: Tensor) -> Tensor:
    """Return u with the tokens of every batch element and group channels last and dense; those two may lie anyhow."""
    inner = u[0, 0].permute(1, 2, 0)
    return u if inner.is_contiguous() else empty_grid(u).copy_(u)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def forward(u, delta, A, B, C, delta_bias, delta_softplus: bool, directions: tuple[str, ...], keep: bool):
    """Return y (batch, K, D, H, W) and the kept states, empty unless `keep`."""
    from v2m.kernels.scan2d.triton_forward import scan_forward

    plan = Launch.of(u, A, directions)
    u, delta = _readable(u), _dense(delta)
    y = empty_grid(u)
    saved = A.new_empty(saved_shape(u, A, B, C, directions) if keep else (0,))
    with _device(u):
        scan_forward[plan.grid](
            u, delta, *plan.matrices(A, B, C), _contiguous(delta_bias), y,
            saved if keep else None, SOFTPLUS=delta_softplus, **plan.arguments(u, B, C),
        )  # fmt: skip
    return y, saved


def backward(dy, u, delta, A, B, C, delta_bias, saved, delta_softplus: bool, directions: tuple[str, ...]):
    """Return the gradients to u, delta, A, B, C and delta_bias, shaped as they are; None for what is None."""
    from v2m.kernels.scan2d.triton_backward import scan_backward

    plan = Launch.of(u, A, directions)
    u, delta, dy = _readable(u), _dense(delta), _dense(dy)
    du, ddelta = empty_grid(u), empty_grid(u)
    dA = plan.partial(A, A.dtype)
    dB, dC = (plan.partial(matrix, A.dtype) for matrix in (B, C))
    dbias = None
    if delta_bias is not None:
        dbias = A.new_empty(plan.batch * plan.splits, *delta_bias.shape)
    with _device(u):
        scan_backward[plan.grid](
            dy, u, delta, *plan.matrices(A, B, C), _contiguous(delta_bias), saved, du, ddelta, dA,
            dA if dB is None else dB, dA if dC is None else dC, dbias,
            BLOCKS=state_blocks(plan.padded), SOFTPLUS=delta_softplus, **plan.arguments(u, B, C),
        )  # fmt: skip
    sums = plan.add(dA, A), plan.add(dB, B), plan.add(dC, C)
    return du, ddelta, *sums, None if dbias is None else dbias.sum(0)


def _contiguous(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.contiguous()
