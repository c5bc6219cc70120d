"""The selective scan in plain PyTorch, a chunk of steps at a time: runs on every device, needs no compiler.

A chunk's decays are one large ``exp_``, its states one in-place ``addcmul_`` a step, its outputs one product.
The forward keeps only the state before every chunk; the backward goes through the chunks from the last to the
first, computes their states again and runs the adjoint ``g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}``
(README.md derives the gradients). Tensors inside a chunk are (step, batch, width, N): a step is contiguous.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 32  # of a chunk: long enough for large calls, short enough that a chunk stays in the cache


def unavailable() -> str:
    """Return why this backend cannot run here; it always can, so the text is empty."""
    return ""


def saved_shape(u: Tensor, A: Tensor, *_) -> tuple[int, ...]:
    """Return the shape of the states before every chunk."""
    batch, width, length = u.shape
    return (-(-length // STEPS), batch, width, A.shape[1])


@dataclass(frozen=True)
class Chunk:
    """Some steps of the channels of one direction, in the order in which they are scanned."""

    number: int  # of the chunk, in that order
    channels: slice
    steps: slice
    back: bool

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(batch, width, L) -> (step, batch, channels)."""
        part = tensor[:, self.channels, self.steps].to(dtype)
        return (part.flip(-1) if self.back else part).permute(2, 0, 1).contiguous()

    def write(self, target: Tensor, values: Tensor) -> None:
        """Put (step, batch, channels) into its place in a (batch, width, L)."""
        target[:, self.channels, self.steps] = (values.flip(0) if self.back else values).permute(1, 2, 0)

    def groups(self, matrix: Tensor, width: int) -> slice:
        """Return which groups of a (batch, G, N, L) these channels read."""
        share = width // matrix.shape[1]
        return slice(self.channels.start // share, self.channels.stop // share)

    def matrix(self, matrix: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """B or C -> (channels, N) where fixed, else (step, batch, groups, N)."""
        if matrix.dim() == 2:
            return matrix[self.channels].to(dtype)
        part = matrix[:, self.groups(matrix, width), :, self.steps].to(dtype)
        return (part.flip(-1) if self.back else part).permute(3, 0, 1, 2).contiguous()

    def add_matrix(self, target: Tensor, width: int, values: Tensor) -> None:
        """Add the gradient of what ``matrix`` returned."""
        if target.dim() == 2:
            target[self.channels] += values
        else:
            values = (values.flip(0) if self.back else values).permute(1, 2, 3, 0)
            target[:, self.groups(target, width), :, self.steps] += values


def chunks(width: int, length: int, reverse: tuple[bool, ...]) -> Iterator[list[Chunk]]:
    """Yield, for every direction group, its chunks in the order of the scan."""
    share = width // len(reverse)
    starts = range(0, length, STEPS)
    for group, back in enumerate(reverse):
        channels = slice(group * share, (group + 1) * share)
        spans = [slice(start, min(start + STEPS, length)) for start in starts]
        ordered = reversed(spans) if back else spans
        yield [Chunk(number, channels, span, back) for number, span in enumerate(ordered)]


def outer(x: Tensor, matrix: Tensor) -> Tensor:
    """x (T, batch, width) times B or C as ``Chunk.matrix`` returns it -> (T, batch, width, N)."""
    if matrix.dim() == 2:
        return x[..., None] * matrix
    groups = matrix.shape[2]
    return (x.unflatten(2, (groups, -1))[..., None] * matrix[:, :, :, None]).flatten(2, 3)


def contract(states: Tensor, matrix: Tensor) -> Tensor:
    """Sum (T, batch, width, N) times B or C over N -> (T, batch, width)."""
    if matrix.dim() == 2:
        return torch.einsum("tbdn,dn->tbd", states, matrix)
    grouped = states.unflatten(2, (matrix.shape[2], -1))
    return (grouped @ matrix[..., None]).flatten(2)


def reduce(states: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Sum (T, batch, width, N) times x (T, batch, width) over what B or C, ``like``, does not have."""
    if like.dim() == 2:
        return torch.einsum("tbdn,tbd->dn", states, x)
    groups = like.shape[2]
    return (x.unflatten(2, (groups, 1, -1)) @ states.unflatten(2, (groups, -1))).squeeze(3)


def positive(step: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Return the step sizes (T, batch, channels) that the recurrence uses."""
    if delta_bias is not None:
        step = step + delta_bias
    return F.softplus(step) if delta_softplus else step


def advance(decay: Tensor, drive: Tensor, state: Tensor) -> Tensor:
    """Turn the drive (T, batch, width, N) in place into the states after every step; return the last one."""
    for decay_t, drive_t in zip(decay.unbind(0), drive.unbind(0), strict=True):
        state = drive_t.addcmul_(decay_t, state)
    return state


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, reverse: tuple[bool, ...], keep: bool):
    """Return y, the last state and, if ``keep``, the state before every chunk."""
    batch, width, length = u.shape
    y = torch.empty_like(u)
    last = A.new_empty(batch, width, A.shape[1])
    saved = A.new_empty(saved_shape(u, A) if keep else (0,))
    for group in chunks(width, length, reverse):
        channels = group[0].channels
        bias = None if delta_bias is None else delta_bias[channels]
        state = torch.zeros_like(last[:, channels])
        for chunk in group:
            if keep:
                saved[chunk.number, :, channels] = state
            x = chunk.read(u, A.dtype)
            step = positive(chunk.read(delta, A.dtype), bias, delta_softplus)
            decay = (step[..., None] * A[channels]).exp_()
            states = outer(step * x, chunk.matrix(B, width, A.dtype))
            state = advance(decay, states, state).clone()
            out = contract(states, chunk.matrix(C, width, A.dtype))
            if D is not None:
                out.addcmul_(x, D[channels])
            if z is not None:
                out *= F.silu(chunk.read(z, A.dtype))
            chunk.write(y, out)
        last[:, channels] = state
    return y, last, saved


def backward(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus: bool, reverse):
    """Return the gradients to u, delta, A, B, C, D, z and delta_bias (None where the argument is None)."""
    width, length = u.shape[1:]
    # Gradients that are sums are gathered in A's dtype, so that half precision rounds them once.
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(u), None if z is None else torch.empty_like(u)
    sums = [None if t is None else torch.zeros_like(t, dtype=A.dtype) for t in (A, B, C, D, delta_bias)]
    dA, dB, dC, dD, dbias = sums
    for group in chunks(width, length, reverse):
        channels = group[0].channels
        carry = torch.zeros_like(saved[0, :, channels]) if dlast is None else dlast[:, channels].clone()
        for chunk in reversed(group):
            inputs = [None if t is None else chunk.read(t, A.dtype) for t in (dy, u, delta, z)]
            matrices = [chunk.matrix(matrix, width, A.dtype) for matrix in (B, C)]
            vectors = [None if t is None else t[channels] for t in (A, D, delta_bias)]
            start = saved[chunk.number, :, channels]
            parts, carry = _chunk_backward(*inputs, *matrices, *vectors, delta_softplus, start, carry)
            for target, name in ((du, "u"), (ddelta, "delta"), (dz, "z")):
                if target is not None:
                    chunk.write(target, parts[name])
            chunk.add_matrix(dB, width, parts["B"])
            chunk.add_matrix(dC, width, parts["C"])
            dA[channels] += parts["A"]
            if D is not None:
                dD[channels] += parts["D"]
            if delta_bias is not None:
                dbias[channels] += parts["delta"].sum((0, 1))
    return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias


def _chunk_backward(dy, x, delta, z, B, C, A, D, delta_bias, delta_softplus, start, carry):
    """Return the gradients of one chunk by name, and the gradient to the state before it.

    ``start`` is the state before the chunk, ``carry`` the gradient to the state after it.
    """
    parts = {}
    step = positive(delta, delta_bias, delta_softplus)
    decay = (step[..., None] * A).exp_()
    driven = step * x
    states = outer(driven, B)
    advance(decay, states, start)
    if z is not None:
        gate = torch.sigmoid(z)
        out = contract(states, C)
        if D is not None:
            out.addcmul_(x, D)
        parts["z"] = dy * out * gate * (1 + z * (1 - gate))
        dy = dy * z * gate
    parts["C"] = reduce(states, dy, C)
    adjoint = outer(dy, C)
    adjoint[-1] += carry
    for t in range(len(adjoint) - 1, 0, -1):
        adjoint[t - 1].addcmul_(decay[t], adjoint[t])
    carry = decay[0] * adjoint[0]
    parts["B"] = reduce(adjoint, driven, B)
    ddriven = contract(adjoint, B)
    # From here on ``decay`` holds the gradient to its own exponent, step * A.
    decay *= adjoint
    decay[1:] *= states[:-1]
    decay[0] *= start
    parts["A"] = torch.einsum("tbdn,tbd->dn", decay, step)
    dstep = torch.einsum("tbdn,dn->tbd", decay, A).addcmul_(ddriven, x)
    parts["delta"] = (
        dstep * torch.sigmoid(delta if delta_bias is None else delta + delta_bias) if delta_softplus else dstep
    )
    parts["u"] = ddriven * step
    if D is not None:
        parts["D"] = (dy * x).sum((0, 1))
        parts["u"].addcmul_(dy, D)
    return parts, carry
