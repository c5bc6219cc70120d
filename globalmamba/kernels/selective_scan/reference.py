"""The selective scan by its definition, one step after the other: the judge of every other backend.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = <C_t, h_t> + D u_t

Mamba, arXiv 2312.00752, equations 1 and 2 with the discretisation of its section 3.6 as released: the exact
one for A, Euler's for B.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def unavailable() -> str:
    """Return why this backend cannot run here; it always can, so the text is empty."""
    return ""


def steps(matrix: Tensor, width: int) -> Tensor:
    """Return B or C, (width, N) or (batch, G, N, L), as (batch or 1, width, N, L or 1)."""
    if matrix.dim() == 2:
        return matrix[None, :, :, None]
    return matrix.repeat_interleave(width // matrix.shape[1], dim=1)


def flipped(tensor: Tensor, reverse: tuple[bool, ...]) -> Tensor:
    """Return (batch, width, ...) with the last axis flipped for the channels of every reversed group."""
    if not any(reverse):
        return tensor
    groups = tensor.chunk(len(reverse), dim=1)
    return torch.cat([g.flip(-1) if back else g for g, back in zip(groups, reverse, strict=True)], 1)


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, reverse: tuple[bool, ...]):
    """Return y (batch, width, L) in u's dtype and the last state (batch, width, N), differentiable.

    Arguments are those of ``selective_scan`` with B and C as (width, N) or (batch, G, N, L) and one direction
    per group of channels. Computed in float32, or in float64 where u is.
    """
    width, length = u.shape[1:]
    dtype = torch.promote_types(torch.promote_types(u.dtype, torch.float32), A.dtype)
    x, step, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    # A matrix that does not depend on time has one step, which every step shares.
    ordered = [flipped(tensor, reverse) for tensor in (x, step, steps(B, width), steps(C, width))]
    inputs = [ordered[0].unbind(-1), ordered[1].unbind(-1)]
    inputs += [m.unbind(-1) if m.shape[-1] == length else m.unbind(-1) * length for m in ordered[2:]]
    state = x.new_zeros(*x.shape[:2], A.shape[1])
    outputs = []
    for x_t, step_t, B_t, C_t in zip(*inputs, strict=True):
        state = torch.exp(step_t[..., None] * A) * state + (step_t * x_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = flipped(torch.stack(outputs, -1), reverse)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state
