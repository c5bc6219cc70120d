"""The peer: mamba-ssm's own CUDA scan, where it is installed. Reversed groups are flipped around it."""

import importlib.util

import torch
from torch import Tensor

from globalmamba.kernels.selective_scan.reference import flipped


def unavailable() -> str:
    """Return why this backend cannot run here, or an empty text."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed; it is never needed, backend='auto' does without"
    return "" if torch.cuda.is_available() else "mamba-ssm needs a CUDA device"


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, reverse: tuple[bool, ...]):
    """Return y and the last state as ``reference.scan`` does, by mamba-ssm's kernel."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def turned(tensor: Tensor | None) -> Tensor | None:
        # Channels stand on axis 1 of u, groups of channels on axis 1 of B and C; a fixed matrix has no time.
        return tensor if tensor is None or tensor.dim() == 2 else flipped(tensor, reverse)

    options = {"delta_softplus": delta_softplus, "return_last_state": True}
    y, last = selective_scan_fn(turned(u), turned(delta), A, turned(B), turned(C), D, turned(z), delta_bias, **options)
    return turned(y), last
