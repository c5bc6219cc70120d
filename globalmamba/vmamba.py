"""VMamba, the base of GlobalMamba-T/S/B: a pyramid of blocks that scan a grid of tokens in four directions.

The network is ``vmamba_base.py``'s (arXiv 2401.10166). Tokens are channels last, (B, L, C), and a layout says which
grids they form: one grid here, several in ``globalmamba.pyramid``, whose levels pass the same blocks side by side.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from globalmamba.kernels.selective_scan import selective_scan
from globalmamba.layout import Layout
from globalmamba.vmamba_base import DELTA_RANGE, DIRECTIONS, VMambaBase, check_official

# The official sizes: vmamba_tiny_s1l8, vmamba_small_s2l15, vmamba_base_s2l15.
SIZES = {
    "tiny": {"depths": (2, 2, 8, 2), "dims": 96, "ssm_ratio": 1.0},
    "small": {"depths": (2, 2, 15, 2), "dims": 96, "ssm_ratio": 2.0},
    "base": {"depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0},
}
BACKWARDS = (False, False, True, True)


class SS2D(nn.Module):
    """The mixer: (B, L, dim) -> (B, L, dim), four scans over every grid of a layout in one call.

    ``ssm_ratio`` widens the scanned channels to d = ratio x dim; ``state_dim`` is N; the rank R of the step
    sizes is dim / 16, rounded up.
    """

    def __init__(self, dim: int, ssm_ratio: float, state_dim: int, backend: str):
        super().__init__()
        width, rank = round(ssm_ratio * dim), math.ceil(dim / 16)
        self.split, self.backend = (rank, state_dim, state_dim), backend
        self.in_proj = nn.Linear(dim, width, bias=False)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, sum(self.split), width))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, width, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, width))
        states = torch.arange(1.0, state_dim + 1).log()
        self.A_logs = nn.Parameter(states.repeat(DIRECTIONS * width, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * width))
        self.out_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the projections and the step sizes as Mamba does: softplus(bias) is log-uniform."""
        for weight in (self.x_proj_weight, self.dt_projs_weight):
            weight.uniform_(-(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        delta = self.dt_projs_bias.uniform_(*map(math.log, DELTA_RANGE)).exp()
        self.dt_projs_bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        x = layout.grids(self.in_proj(tokens))
        x = F.silu(layout.tokens([self.conv2d(grid) for grid in x]))  # (B, L, d)
        return self.out_proj(self.out_norm(self.scan(x, layout)))

    def scan(self, x: Tensor, layout: Layout) -> Tensor:
        """Return the sum of the four scans over x, (B, L, d)."""
        rows, columns = layout.sequences(x)
        # A projection is the same before and after reordering, and its output is the smaller one to reorder.
        selected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (2, 2, -1))  # (B, L, 2, 2, R + 2N)
        of_rows, of_columns = (part.flatten(2) for part in selected.unbind(3))
        ordered = layout.sequences(of_rows)[0], layout.sequences(of_columns)[1]
        selected = torch.stack([part.unflatten(-1, (2, -1)) for part in ordered], 3).flatten(2, 3)
        ranks, B, C = selected.split(self.split, -1)  # each (B, L, 4, ...)
        pairs = zip(ranks.unbind(2), self.dt_projs_weight.unbind(), strict=True)
        delta = torch.cat([F.linear(rank, weight) for rank, weight in pairs], -1)  # (B, L, 4d)
        dtype = torch.promote_types(self.A_logs.dtype, torch.float32)
        y = selective_scan(
            torch.cat([rows, columns, rows, columns], -1).transpose(1, 2),  # (B, 4d, L)
            delta.transpose(1, 2),
            -torch.exp(self.A_logs.to(dtype)),
            B.permute(0, 2, 3, 1),  # (B, 4, N, L)
            C.permute(0, 2, 3, 1),
            self.Ds.to(dtype),
            delta_bias=self.dt_projs_bias.flatten().to(dtype),
            delta_softplus=True,
            backend=self.backend,
            reverse=BACKWARDS,
        )
        forwards, backwards = y.transpose(1, 2).chunk(2, -1)
        return layout.merged(*(forwards + backwards).chunk(2, -1))


class VMamba(VMambaBase):
    """Images (B, in_channels, H, W) -> logits (B, num_classes), or a list of stage outputs (B, C, h, w).

    ``ssm_ratio``, ``state_dim`` and ``backend`` are those of ``SS2D``, the rest is ``VMambaBase``'s.
    """

    def __init__(self, *, ssm_ratio: float, state_dim: int = 1, backend: str = "auto", **pyramid):
        super().__init__(mixer=lambda dim: SS2D(dim, ssm_ratio, state_dim, backend), **pyramid)

    def layout(self, grids: Sequence[Tensor]) -> Layout:
        """Return the layout of the levels' grids (B, C, h, w), the top level last."""
        return Layout(tuple(tuple(grid.shape[2:]) for grid in grids))

    def after_blocks(self, stage: int, grids: list[Tensor]) -> list[Tensor]:
        """Return the grids that leave a stage; a pyramid of several levels merges them here."""
        return grids

    def run_blocks(self, stage: int, grids: list[Tensor]) -> list[Tensor]:
        """Return the grids (B, C, h, w) that leave the blocks of a stage, all of them one sequence there."""
        layout = self.layout(grids)
        tokens = layout.tokens(grids)
        for block in self.layers[stage].blocks:
            tokens = block(tokens, layout)
        return self.after_blocks(stage, layout.grids(tokens))


def from_official(state: dict) -> dict:
    """Return the tensors of an official VMamba checkpoint, checked; UserError for another model's."""
    return check_official(state, VMamba)
