"""What the mixers here are made of: one pass of Mamba's selective scan over a grid, in one or several directions.

Mamba, arXiv 2312.00752, section 3: a short convolution, step size, B and C chosen by the token, the scan, the skip
``D u``. Vim's mixer is one pass over a sequence in both directions; V2M's is a row pass and then a column pass, in
which C or B is the constant 1 (arXiv 2410.10382, as released). A sequence is a grid of one row.

A pass keeps its parameters under the names of the official checkpoints, so they hang on the mixer itself, told apart
by a suffix: ``conv1d_2``, ``x_proj_2``, ``dt_proj_2``, ``A_2_log``, ``D_2``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError
from v2m.kernels.scan2d import scan2d
from v2m.kernels.scan2d.op import MAX_STATE
from v2m.kernels.short_conv import short_conv
from v2m.vim_base import add_pass

MATRICES = ("B", "C")


class ScanMixer(nn.Module):
    """The parts that mixers share: projections in and out, and passes added by ``add_pass``.

    embed_dim: E, channels of a token; width D = expand E; state_dim: N; the rank of the step sizes is E / 16, rounded
    up. ``backend`` is that of the scan. Raises UserError for sizes that cannot be scanned.
    """

    plane = False  # whether tokens above and below mean something to it

    def __init__(self, embed_dim: int, state_dim: int, expand: int, conv_kernel: int, backend: str):
        super().__init__()
        require_sizes(state_dim, expand, conv_kernel)
        self.width, self.state_dim, self.rank = expand * embed_dim, state_dim, math.ceil(embed_dim / 16)
        self.conv_kernel, self.backend = conv_kernel, backend
        self.in_proj = nn.Linear(embed_dim, 2 * self.width, bias=False)
        self.out_proj = nn.Linear(self.width, embed_dim, bias=False)

    def add_pass(self, suffix: str, chosen: Sequence[str] = MATRICES) -> None:
        """Make the parameters of a pass; ``chosen`` of B and C are the token's choice, the other is constantly 1."""
        add_pass(
            self,
            suffix,
            width=self.width,
            rank=self.rank,
            state_dim=self.state_dim,
            conv_kernel=self.conv_kernel,
            matrices=len(chosen),
        )

    def project_in(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, E) -> what is scanned and, after its SiLU, what gates it, each (B, 1, H, W, D)."""
        # Two products rather than one that is cut in two: what follows wants dense tensors.
        x, gate = (F.linear(grid, weight)[:, None] for weight in self.in_proj.weight.chunk(2))
        return x, F.silu(gate)

    def run_pass(
        self,
        sources: Tensor,
        directions: Sequence[str],
        suffixes: Sequence[str] = ("",),
        chosen: Sequence[str] = MATRICES,
    ) -> Tensor:
        """Scan (B, S, H, W, D) in K directions -> (B, K, H, W, D), the skip added, nothing gated.

        Group k reads source k // (K // S). ``suffixes`` name the parameters: one for all groups, or one for each.
        """
        u, delta, matrices, suffixes = self.selection(sources, directions, suffixes, chosen)
        groups = len(directions)

        def every(name: str) -> Tensor:
            return _of_groups([getattr(self, name.format(suffix)) for suffix in suffixes], groups)

        A_log = every("A{}_log")
        y = scan2d(
            u.permute(0, 1, 4, 2, 3),
            delta.permute(0, 1, 4, 2, 3),
            -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32))),
            **{name: matrices.get(name) for name in MATRICES},
            directions=directions,
            delta_bias=_of_groups([getattr(self, f"dt_proj{suffix}").bias for suffix in suffixes], groups),
            delta_softplus=True,
            backend=self.backend,
        )
        D = every("D{}")[:, None, None]
        return torch.addcmul(y.permute(0, 1, 3, 4, 2), u, D.to(u.dtype))

    def selection(self, sources, directions, suffixes, chosen) -> tuple[Tensor, Tensor, dict[str, Tensor], list]:
        """Return u and delta (B, K, H, W, D), the chosen matrices (B, K, N, H, W) by name, the suffixes in use."""
        layers = [[getattr(self, f"{n}{s}") for s in suffixes] for n in ("conv1d", "x_proj", "dt_proj")]
        u = self._convolved(sources, layers[0], directions)
        selected = _linear(u, [layer.weight for layer in layers[1]])  # (B, K, H, W, R + N or 2 N)
        delta = _linear(selected[..., : self.rank], [layer.weight for layer in layers[2]])
        parts = selected[..., self.rank :].permute(0, 1, 4, 2, 3).split(self.state_dim, 2)
        return u, delta, dict(zip(chosen, parts, strict=True)), list(suffixes)

    def _convolved(self, sources: Tensor, layers: list[nn.Conv1d], directions: Sequence[str]) -> Tensor:
        weight = _of_groups([layer.weight[:, 0] for layer in layers], len(directions))
        bias = _of_groups([layer.bias for layer in layers], len(directions))
        backend = "reference" if self.backend == "reference" else "auto"
        return short_conv(sources, weight, bias, directions, backend)


def require_sizes(state_dim: int, expand: float, conv_kernel: int) -> None:
    """Raise UserError for a state, a width or a convolution that a pass cannot have."""
    if not 1 <= state_dim <= MAX_STATE or expand <= 0 or conv_kernel < 1:
        raise UserError(
            f"state_dim {state_dim}, expand {expand}, conv_kernel {conv_kernel}: give 1 to {MAX_STATE} states, a "
            "positive width and 1 tap or more"
        )


def _of_groups(tensors: list[Tensor], groups: int) -> Tensor:
    """Return one tensor a group, stacked; a single one is shared by all."""
    return tensors[0].expand(groups, *tensors[0].shape) if len(tensors) == 1 else torch.stack(tensors)


def _linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    """(B, K, H, W, I) -> (B, K, H, W, O), by one weight (O, I) for all groups or one for each."""
    if len(weights) == 1:
        return F.linear(x, weights[0])
    return torch.stack([F.linear(part, weight) for part, weight in zip(x.unbind(1), weights, strict=True)], 1)
