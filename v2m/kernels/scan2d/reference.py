"""The scan of a grid by its definition, one step after the other: the judge of every other backend.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = <C_t, h_t>,   h = 0 before a row or column begins

Mamba's recurrence and discretisation (arXiv 2312.00752, equations 1 and 2, section 3.6 as released), on every row or
column of a grid alone: one of the two passes of V2M (arXiv 2410.10382).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# (axis of the tensor (..., H, W) that is walked, whether from its end)
DIRECTIONS = {"right": (-1, False), "left": (-1, True), "down": (-2, False), "up": (-2, True)}


def unavailable() -> str:
    """Return why this backend cannot run here; it always can, so the text is empty."""
    return ""


def by_axis(directions: tuple[str, ...]) -> list[tuple[int, list[int], list[bool]]]:
    """Return, for each axis in use, which groups walk along it and which of them backwards."""
    passes = []
    for axis in (-1, -2):
        groups = [k for k, name in enumerate(directions) if DIRECTIONS[name][0] == axis]
        if groups:
            passes.append((axis, groups, [DIRECTIONS[directions[k]][1] for k in groups]))
    return passes


def _flipped(tensor: Tensor, axis: int, back: list[bool]) -> Tensor:
    """Flip an axis for the groups, on axis 1, that run backwards."""
    if not any(back):
        return tensor
    parts = zip(tensor.unbind(1), back, strict=True)
    return torch.stack([part.flip(axis) if b else part for part, b in parts], 1)


def turned(tensor: Tensor, axis: int, back: list[bool]) -> Tensor:
    """(batch, K, ..., H, W) -> (batch, K, ..., lines, steps), the steps in the order of the scan."""
    return _flipped(tensor, axis, back).transpose(axis, -1)


def returned(tensor: Tensor, axis: int, back: list[bool]) -> Tensor:
    """Undo ``turned``."""
    return _flipped(tensor.transpose(axis, -1), axis, back)


def scan(u, delta, A, B, C, delta_bias, delta_softplus: bool, directions: tuple[str, ...]) -> Tensor:
    """Return y (batch, K, D, H, W) in u's dtype, differentiable; arguments are those of ``scan2d``.

    Computed in float32, or in float64 where u is.
    """
    dtype = torch.promote_types(torch.promote_types(u.dtype, torch.float32), A.dtype)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, :, None, None]
    if delta_softplus:
        step = F.softplus(step)
    results: list = [None] * len(directions)
    for axis, groups, back in by_axis(directions):
        x, s = (turned(tensor[:, groups].to(dtype), axis, back) for tensor in (u, step))
        matrices = [_steps(matrix, groups, axis, back, dtype, x.shape[-1]) for matrix in (B, C)]
        y = returned(_scan_lines(x, s, A[groups].to(dtype)[:, :, None], *matrices), axis, back)
        for place, k in enumerate(groups):
            results[k] = y[:, place]
    return torch.stack(results, 1).to(u.dtype)


def _steps(matrix, groups, axis, back, dtype, length) -> list:
    """Return B or C for every step, each broadcastable to (batch, K, D, lines, N); None where there is none."""
    if matrix is None:
        return [None] * length
    matrix = matrix[groups] if matrix.dim() == 3 else matrix[:, groups]
    if matrix.dim() == 3:
        return [matrix.to(dtype)[:, :, None]] * length
    # (batch, K, N, lines, steps) -> (batch, K, 1, lines, N) at each step
    return turned(matrix.to(dtype), axis, back).transpose(2, 3).unsqueeze(2).unbind(-1)


def _scan_lines(x, step, A, B, C) -> Tensor:
    """x and step (batch, K, D, lines, steps), A (K, D, 1, N), B and C one a step -> y like x."""
    state = x.new_zeros(*x.shape[:-1], A.shape[-1])
    outputs = []
    for x_t, step_t, B_t, C_t in zip(x.unbind(-1), step.unbind(-1), B, C, strict=True):
        drive = (step_t * x_t)[..., None]
        state = torch.exp(step_t[..., None] * A) * state + (drive if B_t is None else drive * B_t)
        outputs.append((state if C_t is None else state * C_t).sum(-1))
    return torch.stack(outputs, -1)
