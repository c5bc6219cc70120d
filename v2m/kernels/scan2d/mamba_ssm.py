"""The peer: mamba-ssm's own CUDA scan, where it is installed, on rows and columns copied into sequences."""

import importlib.util

import torch
from torch import Tensor

from v2m.kernels.scan2d.reference import by_axis, returned, turned


def unavailable() -> str:
    """Return why this backend cannot run here, or an empty text."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed; it is never needed, backend='auto' does without"
    return "" if torch.cuda.is_available() else "mamba-ssm needs a CUDA device"


def scan(u, delta, A, B, C, delta_bias, delta_softplus: bool, directions: tuple[str, ...]) -> Tensor:
    """Return y as ``reference.scan`` does, by mamba-ssm's kernel; a constant B or C is a matrix of ones to it."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    results: list = [None] * len(directions)
    for axis, groups, back in by_axis(directions):
        inputs = [turned(t[:, groups], axis, back) for t in (u, delta)]
        matrices = [_lines(t, groups, axis, back) for t in (B, C)]
        for place, k in enumerate(groups):
            # Every line is a sequence of a batch: (batch, D, lines, steps) -> (batch x lines, D, steps).
            x, step = (t[:, place].transpose(1, 2).flatten(0, 1).contiguous() for t in inputs)
            pair = [torch.ones_like(A[k]) if m is None else m[place] for m in matrices]
            bias = None if delta_bias is None else delta_bias[k].contiguous()
            y = selective_scan_fn(x, step, A[k].contiguous(), *pair, None, None, bias, delta_softplus)
            y = y.unflatten(0, (len(u), -1)).transpose(1, 2)[:, None]
            results[k] = returned(y, axis, back[place : place + 1])[:, 0]
    return torch.stack(results, 1)


def _lines(matrix: Tensor | None, groups: list[int], axis: int, back: list[bool]) -> list[Tensor] | None:
    """Return B or C of each group: (D, N), or (batch x lines, N, steps)."""
    if matrix is None:
        return None
    if matrix.dim() == 3:
        return [matrix[k].contiguous() for k in groups]
    lined = turned(matrix[:, groups], axis, back)
    return [part.transpose(1, 2).flatten(0, 1).contiguous() for part in lined.unbind(1)]
