"""One pass as it is composed of ordinary operators: what benchmarks and tests hold the kernels' time against.

Each direction alone: the grid is transposed for columns and flipped for the way back, as copies; its lines become a
batch of sequences; decays and drives of all steps are made at once, as in the reference of mamba-ssm; then a loop
over the steps. Copies and loop are what a user writes without a kernel of the plane.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from v2m.kernels.scan2d.reference import DIRECTIONS


def scan(u, delta, A, B, C, delta_bias, delta_softplus: bool, directions: tuple[str, ...]) -> Tensor:
    """Return y (batch, K, D, H, W), differentiable; arguments are those of ``scan2d``, B and C None or variable."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, :, None, None]
    delta = F.softplus(delta) if delta_softplus else delta
    results = []
    for group, name in enumerate(directions):
        axis, back = DIRECTIONS[name]

        def lines(tensor: Tensor | None, group=group, axis=axis, back=back) -> Tensor | None:
            """(batch, K, ., H, W) -> (batch x lines, ., steps)."""
            if tensor is None:
                return None
            part = tensor[:, group].transpose(axis, -1)
            part = part.flip(-1) if back else part
            return part.transpose(1, 2).flatten(0, 1).contiguous()

        y = _sequences(lines(u), lines(delta), A[group], lines(B), lines(C))
        y = y.unflatten(0, (len(u), -1)).transpose(1, 2)
        results.append((y.flip(-1) if back else y).transpose(axis, -1))
    return torch.stack(results, 1)


def _sequences(x, step, A, B, C) -> Tensor:
    """x, step (M, D, L), A (D, N), B and C None or (M, N, L) -> (M, D, L)."""
    decay = torch.exp(step[..., None] * A[:, None])  # (M, D, L, N)
    drive = (step * x)[..., None]
    drive = drive.expand_as(decay) if B is None else drive * B.transpose(1, 2)[:, None]
    state, outputs = x.new_zeros(*x.shape[:2], A.shape[1]), []
    rows = [None] * x.shape[2] if C is None else C.unbind(2)
    for decay_t, drive_t, C_t in zip(decay.unbind(2), drive.unbind(2), rows, strict=True):
        state = decay_t * state + drive_t
        outputs.append(state.sum(-1) if C_t is None else torch.einsum("mdn,mn->md", state, C_t))
    return torch.stack(outputs, 2)
