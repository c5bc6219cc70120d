"""The scan of a grid in plain PyTorch, a chunk of steps at a time: runs on every device, needs no compiler.

A chunk's decays are one large ``exp_``, its states one in-place ``addcmul_`` a step, its outputs one product. All
rows (columns) go side by side. The forward keeps only the states before the second and every later chunk; the
backward goes through the chunks from the last to the first, computes their states again and runs the adjoint
``g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}`` (README.md derives the gradients). Tensors inside a chunk are
(step, batch x lines, D, N): a step is contiguous.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from v2m.kernels.scan2d.op import empty_grid
from v2m.kernels.scan2d.reference import DIRECTIONS

STEPS = 32  # of a chunk: long enough for large calls, short enough that a chunk stays in the cache


def unavailable() -> str:
    """Return why this backend cannot run here; it always can, so the text is empty."""
    return ""


def saved_shape(u: Tensor, A: Tensor, B, C, directions: tuple[str, ...]) -> tuple[int]:
    """Return the shape of the states before the second and every later chunk, flat, group after group."""
    states = 0
    for name in directions:
        steps = u.shape[DIRECTIONS[name][0]]
        lines = u.shape[3] * u.shape[4] // steps
        states += _later(steps) * len(u) * lines
    return (states * A.shape[1] * A.shape[2],)


def _later(steps: int) -> int:
    """Return how many chunks follow the first."""
    return -(-steps // STEPS) - 1


@dataclass(frozen=True)
class Chunk:
    """Some steps of all lines of one group, in the order in which they are scanned."""

    number: int  # in that order
    group: int
    axis: int
    steps: slice
    back: bool

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(batch, K, D or N, H, W) -> (step, batch x lines, D or N)."""
        part = tensor[:, self.group].transpose(self.axis, -1)[..., self.steps].to(dtype)
        part = part.flip(-1) if self.back else part
        return part.permute(3, 0, 2, 1).flatten(1, 2).contiguous()

    def write(self, target: Tensor, values: Tensor) -> None:
        """Put what ``read`` returns into its place."""
        values = values.unflatten(1, (len(target), -1)).permute(1, 3, 2, 0)
        values = values.flip(-1) if self.back else values
        target[:, self.group].transpose(self.axis, -1)[..., self.steps] = values

    def matrix(self, matrix: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """B or C -> (D, N) where fixed, (step, batch x lines, N) where variable."""
        if matrix is None or matrix.dim() == 3:
            return None if matrix is None else matrix[self.group].to(dtype)
        return self.read(matrix, dtype)

    def put_matrix(self, target: Tensor | None, values: Tensor | None) -> None:
        """Hand on the gradient of what ``matrix`` returned."""
        if target is None:
            return
        if target.dim() == 3:
            target[self.group] += values
        else:
            self.write(target, values)


def chunks(shape: torch.Size, directions: tuple[str, ...]) -> Iterator[list[Chunk]]:
    """Yield, for every group, its chunks in the order of the scan."""
    for group, name in enumerate(directions):
        axis, back = DIRECTIONS[name]
        length = shape[axis]
        spans = [slice(start, min(start + STEPS, length)) for start in range(0, length, STEPS)]
        if back:
            spans = [slice(length - span.stop, length - span.start) for span in spans]
        yield [Chunk(number, group, axis, span, back) for number, span in enumerate(spans)]


def outer(x: Tensor, matrix: Tensor | None, state: int) -> Tensor:
    """x (T, M, D) times B or C as ``Chunk.matrix`` returns it -> (T, M, D, N), in memory of its own."""
    if matrix is None:
        return x[..., None].repeat(1, 1, 1, state)
    return x[..., None] * (matrix if matrix.dim() == 2 else matrix[:, :, None])


def contract(states: Tensor, matrix: Tensor | None) -> Tensor:
    """(T, M, D, N) times B or C, summed over the states -> (T, M, D)."""
    if matrix is None:
        return states.sum(-1)
    if matrix.dim() == 2:
        return torch.einsum("tmdn,dn->tmd", states, matrix)
    return (states @ matrix[..., None]).squeeze(-1)


def reduce(states: Tensor, x: Tensor, like: Tensor | None) -> Tensor | None:
    """Sum (T, M, D, N) times x (T, M, D) over what B or C, ``like``, does not have."""
    if like is None:
        return None
    if like.dim() == 2:
        return torch.einsum("tmdn,tmd->dn", states, x)
    return (x[:, :, None] @ states).squeeze(2)


def positive(step: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Return the step sizes (T, M, D) that the recurrence uses."""
    if delta_bias is not None:
        step = step + delta_bias
    return F.softplus(step) if delta_softplus else step


def advance(decay: Tensor, drive: Tensor, state: Tensor | None) -> Tensor:
    """Turn the drive (T, M, D, N) in place into the states after every step; return the last one."""
    for decay_t, drive_t in zip(decay.unbind(0), drive.unbind(0), strict=True):
        state = drive_t if state is None else drive_t.addcmul_(decay_t, state)
    return state


def forward(u, delta, A, B, C, delta_bias, delta_softplus: bool, directions: tuple[str, ...], keep: bool):
    """Return y and, if ``keep``, the states before the later chunks."""
    y = empty_grid(u)
    saved = A.new_empty(saved_shape(u, A, B, C, directions) if keep else (0,))
    place = 0
    for chain in chunks(u.shape, directions):
        state = None
        for chunk in chain:
            if keep and state is not None:
                saved[place : place + state.numel()].view_as(state).copy_(state)
                place += state.numel()
            k = chunk.group
            bias = None if delta_bias is None else delta_bias[k]
            step = positive(chunk.read(delta, A.dtype), bias, delta_softplus)
            decay = (step[..., None] * A[k]).exp_()
            states = outer(step * chunk.read(u, A.dtype), chunk.matrix(B, A.dtype), A.shape[2])
            state = advance(decay, states, state).clone()
            chunk.write(y, contract(states, chunk.matrix(C, A.dtype)))
    return y, saved


def backward(dy, u, delta, A, B, C, delta_bias, saved, delta_softplus: bool, directions):
    """Return the gradients to u, delta, A, B, C and delta_bias (None where the argument is None)."""
    du, ddelta = empty_grid(u), empty_grid(u)
    # Gradients that are sums are gathered in A's dtype, so that half precision rounds them once.
    dA, dB, dC, dbias = (
        None if t is None else torch.zeros(t.shape, dtype=A.dtype, device=A.device) for t in (A, B, C, delta_bias)
    )
    place = len(saved)
    for chain in reversed(list(chunks(u.shape, directions))):
        carry = None
        for chunk in reversed(chain):
            k = chunk.group
            inputs = [chunk.read(t, A.dtype) for t in (dy, u, delta)]
            start = None
            if chunk.number:
                shape = (*inputs[0].shape[1:], A.shape[2])
                size = inputs[0][0].numel() * A.shape[2]
                place -= size
                start = saved[place : place + size].view(shape)
            matrices = [chunk.matrix(t, A.dtype) for t in (B, C)]
            bias = None if delta_bias is None else delta_bias[k]
            parts, carry = _chunk_backward(*inputs, *matrices, A[k], bias, delta_softplus, start, carry)
            chunk.write(du, parts["u"])
            chunk.write(ddelta, parts["delta"])
            chunk.put_matrix(dB, parts["B"])
            chunk.put_matrix(dC, parts["C"])
            dA[k] += parts["A"]
            if dbias is not None:
                dbias[k] += parts["delta"].sum((0, 1))
    dB, dC = (None if d is None else d.to(t.dtype) for d, t in ((dB, B), (dC, C)))
    return du, ddelta, dA, dB, dC, dbias


def _chunk_backward(dy, x, delta, B, C, A, delta_bias, delta_softplus: bool, start, carry):
    """Return the gradients of one chunk by name, and the gradient to the state before it.

    ``start`` is the state before the chunk, ``carry`` the gradient to the state after it; None for zero.
    """
    parts = {}
    step = positive(delta, delta_bias, delta_softplus)
    decay = (step[..., None] * A).exp_()
    driven = step * x
    states = outer(driven, B, A.shape[1])
    advance(decay, states, start)
    parts["C"] = reduce(states, dy, C)
    adjoint = outer(dy, C, A.shape[1])
    if carry is not None:
        adjoint[-1] += carry
    for t in range(len(adjoint) - 1, 0, -1):
        adjoint[t - 1].addcmul_(decay[t], adjoint[t])
    carry = decay[0] * adjoint[0]
    parts["B"] = reduce(adjoint, driven, B)
    ddriven = contract(adjoint, B)
    # From here on ``decay`` holds the gradient to its own exponent, step * A.
    decay *= adjoint
    decay[1:] *= states[:-1]
    decay[0] *= 0 if start is None else start
    parts["A"] = torch.einsum("tmdn,tmd->dn", decay, step)
    dstep = torch.einsum("tmdn,dn->tmd", decay, A).addcmul_(ddriven, x)
    if delta_softplus:
        dstep *= torch.sigmoid(delta if delta_bias is None else delta + delta_bias)
    parts["delta"] = dstep
    parts["u"] = ddriven * step
    return parts, carry
