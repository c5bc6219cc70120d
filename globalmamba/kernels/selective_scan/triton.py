"""The selective scan on NVIDIA GPUs: what is launched, and the sums over what the programs leave behind.

The kernels are in `triton_forward.py` and `triton_backward.py`; README.md derives them. Everything is deterministic:
programs write rows of partial sums, and the rows are added here in a fixed order.

Triton is imported where it is used, so this file can be read on a machine without it. With TRITON_INTERPRET=1 in the
environment the same code runs on the CPU, slowly, through Triton's interpreter.
"""

import contextlib
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 4  # unrolled: their loads are in flight together, more would not leave registers for other programs
WARP = 32
# Thread blocks that fill a large GPU: below it a program takes fewer channels, where it may.
ENOUGH_PROGRAMS = 2048
MAX_DIRECTIONS = 62  # one bit each in an int64


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


def saved_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: tuple[bool, ...]) -> tuple[int, ...]:
    """Shape of the states that the forward keeps: before every second chunk of STEPS, and before each shorter one."""
    plan = Launch.of(u, A, B, C, reverse)
    rest = plan.length % STEPS
    shorter = sum(rest // (STEPS >> k) % 2 for k in range(1, STEPS.bit_length()))
    parts = (plan.length // STEPS + 1) // 2 + shorter
    return plan.batch, parts, *plan.tiles


@dataclass(frozen=True)
class Launch:
    """How a scan is cut into programs: one sequence and one block of channels each."""

    batch: int
    length: int
    state: int
    padded: int  # state, up to a power of two
    channels: int  # of a program
    groups: int  # of channels that share B, C and direction
    group_width: int
    blocks: int  # programs for one group and sequence
    reverse: int  # bit d: direction d runs backwards
    directions: int

    @classmethod
    def of(cls, u: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: tuple[bool, ...]) -> "Launch":
        """Plan for normalised arguments (see `op.py`). Raises ValueError for more than 62 directions."""
        batch, width, length = u.shape
        if len(set(reverse)) == 1:
            reverse = reverse[:1]
        if len(reverse) > MAX_DIRECTIONS:
            raise ValueError(f"the triton backend takes at most {MAX_DIRECTIONS} directions, got {len(reverse)}")
        groups = math.lcm(len(reverse), *(matrix.shape[1] for matrix in (B, C) if matrix.dim() == 4))
        group_width = width // groups
        padded = _power_of_two(A.shape[1])
        channels = _channels(padded, group_width, batch * width)
        return cls(
            batch=batch,
            length=length,
            state=A.shape[1],
            padded=padded,
            channels=channels,
            groups=groups,
            group_width=group_width,
            blocks=-(-group_width // channels),
            reverse=sum(back << d for d, back in enumerate(reverse)),
            directions=len(reverse),
        )

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * self.groups * self.blocks,)

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Shape of what belongs to a channel and a state, as the kernels read and write it."""
        return self.groups * self.blocks, self.padded, self.channels

    def arguments(self, u: Tensor, B: Tensor, C: Tensor) -> dict:
        """What both kernels take beside tensors."""
        return {
            **dict(zip(("batch_stride", "channel_stride", "time_stride"), u.stride(), strict=True)),
            "width": u.shape[1],
            "length": self.length,
            "opaque": 0,
            "groups": self.groups,
            "blocks": self.blocks,
            "group_width": self.group_width,
            "B_share": self.groups // B.shape[1] if B.dim() == 4 else 1,
            "C_share": self.groups // C.shape[1] if C.dim() == 4 else 1,
            "reverse": self.reverse,
            "groups_per_direction": self.groups // self.directions,
            "N": self.state,
            "PADDED": self.padded,
            "CHANNELS": self.channels,
            "STEPS": STEPS,
            "FIXED_B": B.dim() == 2,
            "FIXED_C": C.dim() == 2,
            "EVEN": self.group_width % self.channels == 0,
            "num_warps": 1,
            "num_stages": 1,  # Triton's own pipelining would move the loads through shared memory
        }

    def packed(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """(width, N) -> tiles; B or C of every step -> (batch, G, L, padded), steps in the order of the scan.

        A step's row is then contiguous and needs no conversion: every program of a sequence reads it.
        """
        if matrix.dim() == 2:
            rows = matrix.to(dtype).reshape(self.groups, self.group_width, self.state)
            short = self.blocks * self.channels - self.group_width
            rows = F.pad(rows, (0, self.padded - self.state, 0, short))
            return rows.reshape(-1, self.channels, self.padded).transpose(1, 2).contiguous()
        batch, groups, state, length = matrix.shape
        rows = matrix.new_zeros(batch, groups, length, self.padded, dtype=dtype)
        for own, back in self.shares(groups):
            steps = matrix[:, own].flip(3) if back else matrix[:, own]
            rows[:, own, :, :state] = steps.transpose(2, 3)
        return rows

    def unpacked(self, tiles: Tensor) -> Tensor:
        """Tiles -> (width, N)."""
        rows = tiles.transpose(1, 2).reshape(self.groups, -1, self.padded)
        return rows[:, : self.group_width, : self.state].reshape(-1, self.state)

    def shares(self, groups: int):
        """Yield each direction's part of `groups` groups of B or C, and whether it runs backwards."""
        each = groups // self.directions
        for d in range(self.directions):
            yield slice(d * each, (d + 1) * each), bool(self.reverse >> d & 1)

    def add_blocks(self, rows: Tensor, like: Tensor) -> Tensor:
        """Partial gradients to B or C -> the gradient, shaped as it is."""
        if like.dim() == 2:
            return torch.empty_like(like).copy_(self.unpacked(rows.sum(0)))
        blocks = rows.view(self.batch, like.shape[1], -1, self.length, self.padded)
        whole = blocks.sum(2)  # (batch, G, L, padded)
        gradient = torch.empty_like(like)
        for own, back in self.shares(like.shape[1]):
            steps = whole[:, own].flip(2) if back else whole[:, own]
            gradient[:, own] = steps[..., : self.state].transpose(2, 3)
        return gradient


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _channels(padded: int, group_width: int, rows: int) -> int:
    """Channels of a program, a power of two; `rows` is batch x width.

    16 states a thread, so that N <= 16 needs no exchange between threads. One state leaves room for several channels
    a thread, which makes loads wider, where that still gives every multiprocessor enough programs.
    """
    channels = min(WARP, 16 * WARP // padded)
    if padded == 1:
        while channels < 4 * WARP and rows // (2 * channels) >= ENOUGH_PROGRAMS:
            channels *= 2
    return min(channels, _power_of_two(group_width))


def state_blocks(padded: int) -> int:
    """Into how many tiles the backward divides the states, so that those of a chunk fit into the registers."""
    return 2 if padded >= 16 else 1


def _alike(u: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """u and other tensors (batch, width, L) in the memory order that `empty_like(u)` has, copied where they are not.

    So one offset serves them all, outputs too. Neither (batch, width, L) nor (batch, L, width) in memory is copied.
    """
    like = torch.empty_like(u)
    return tuple(
        t if t is None or t.stride() == like.stride() else torch.empty_like(like).copy_(t) for t in (u, *others)
    )


def _dense(*rows: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if row is None else row.contiguous() for row in rows)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: tuple[bool, ...],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like u, the last state (batch, width, N), and the kept states, empty unless `keep`."""
    from globalmamba.kernels.selective_scan.triton_forward import scan_forward

    plan = Launch.of(u, A, B, C, reverse)
    u, delta, z = _alike(u, delta, z)
    D, delta_bias = _dense(D, delta_bias)
    y = torch.empty_like(u)
    last = A.new_empty(plan.batch, u.shape[1], plan.state)
    saved = A.new_empty(saved_shape(u, A, B, C, reverse) if keep else 0)
    with _device(u):
        scan_forward[plan.grid](
            u, delta, plan.packed(A, A.dtype), plan.packed(B, A.dtype), plan.packed(C, A.dtype), D, z, delta_bias,
            y, last, saved if keep else None, parts=saved.shape[1] if keep else 0, SOFTPLUS=delta_softplus,
            **plan.arguments(u, B, C),
        )  # fmt: skip
    return y, last, saved


def backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    reverse: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients to u, delta, A, B, C, D, z, delta_bias, shaped as they are; None for what is None."""
    from globalmamba.kernels.selective_scan.triton_backward import scan_backward

    plan = Launch.of(u, A, B, C, reverse)
    u, delta, z, dy = _alike(u, delta, z, dy)
    D, delta_bias = _dense(D, delta_bias)
    du, ddelta = torch.empty_like(u), torch.empty_like(u)
    dz = None if z is None else torch.empty_like(u)
    sums = (plan.batch, *plan.tiles)
    rows = (plan.batch, plan.groups * plan.blocks, plan.length, plan.padded)
    dA = A.new_empty(sums)
    dB, dC = (A.new_empty(sums if matrix.dim() == 2 else rows) for matrix in (B, C))
    dD, dbias = (None if row is None else A.new_empty(plan.batch, u.shape[1]) for row in (D, delta_bias))
    dlast = None if dlast is None else dlast.to(A.dtype).contiguous()
    with _device(u):
        scan_backward[plan.grid](
            dy, dlast, u, delta, plan.packed(A, A.dtype), plan.packed(B, A.dtype), plan.packed(C, A.dtype), D, z,
            delta_bias, saved, du, ddelta, dA, dB, dC, dD, dz, dbias, parts=saved.shape[1],
            BLOCKS=state_blocks(plan.padded), SOFTPLUS=delta_softplus, **plan.arguments(u, B, C),
        )  # fmt: skip
    return (
        du,
        ddelta,
        torch.empty_like(A).copy_(plan.unpacked(dA.sum(0))),  # in A's own memory order
        plan.add_blocks(dB, B),
        plan.add_blocks(dC, C),
        None if dD is None else dD.sum(0),
        dz,
        None if dbias is None else dbias.sum(0),
    )
