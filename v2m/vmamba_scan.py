"""VMamba's two mixers of a grid: its own, four scans of the whole image, and V2M's, scans along rows, then columns.

VMamba (arXiv 2401.10166, section 4) unrolls the grid row by row and column by column, each forwards and backwards, and
scans four sequences of H W tokens. V2M (arXiv 2410.10382) puts its scan of the plane in their place: from each corner
a pass along every row (B chosen by the token, C = 1), then one along every column (B = 1, C chosen). What else of
VMamba's block stays is not printed; here all of it stays, and what may differ is an option of ``CornerScan``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError
from v2m.kernels.scan2d import scan2d
from v2m.kernels.short_conv import short_conv
from v2m.passes import require_sizes
from v2m.vmamba_base import DELTA_RANGE, DIRECTIONS

# The corners are top left, bottom left, top right, bottom right; a row pass serves two of them.
COLUMNS = ("down", "up", "down", "up")
ROWS = {1: ("right", "left"), 2: ("right", "left"), 4: ("right", "right", "left", "left")}  # by sets of parameters
FIRST, SECOND = "", "_2"  # suffixes of the parameters


class GridMixer(nn.Module):
    """What both mixers share: (B, H, W, dim) -> (B, H, W, dim), the scan of the widened grid left to a subclass.

    ``ssm_ratio`` widens the scanned channels to d = ratio x dim; ``state_dim`` is N; the rank R of the step sizes is
    dim / 16, rounded up. ``backend`` is that of the scan. Raises UserError for sizes that cannot be scanned.
    """

    def __init__(self, dim: int, ssm_ratio: float, state_dim: int, backend: str):
        super().__init__()
        require_sizes(state_dim, ssm_ratio, conv_kernel=3)
        self.width, self.rank = round(ssm_ratio * dim), math.ceil(dim / 16)
        self.state_dim, self.backend = state_dim, backend
        self.in_proj = nn.Linear(dim, self.width, bias=False)
        self.conv2d = nn.Conv2d(self.width, self.width, 3, padding=1, groups=self.width, bias=False)
        self.out_norm = nn.LayerNorm(self.width)
        self.out_proj = nn.Linear(self.width, dim, bias=False)

    def add_scan(self, suffix: str, sets: int, matrices: int) -> None:
        """Make ``sets`` sets of a scan's parameters, drawn as Mamba does: softplus of the bias is log-uniform.

        ``matrices`` of B and C, one or both, are the token's choice.
        """
        columns = self.rank + matrices * self.state_dim
        x_proj = torch.empty(sets, columns, self.width).uniform_(-(self.width**-0.5), self.width**-0.5)
        dt_proj = torch.empty(sets, self.width, self.rank).uniform_(-(self.rank**-0.5), self.rank**-0.5)
        delta = torch.empty(sets, self.width).uniform_(*map(math.log, DELTA_RANGE)).exp()
        states = torch.arange(1.0, self.state_dim + 1).log()
        drawn = {
            "x_proj_weight": x_proj,
            "dt_projs_weight": dt_proj,
            "dt_projs_bias": delta + torch.log(-torch.expm1(-delta)),
            "A_logs": states.repeat(sets * self.width, 1),
            "Ds": torch.ones(sets * self.width),
        }
        for name, tensor in drawn.items():
            self.register_parameter(f"{name}{suffix}", nn.Parameter(tensor))

    def scan_parameters(self, suffix: str, sets: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return projection (S, R + .., d), step projection (S, d, R) and bias (S, d), A (S, d, N), D (S, d)."""
        x_proj, dt_proj, bias, A_logs, D = (
            getattr(self, f"{name}{suffix}")
            for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
        )
        A = -torch.exp(A_logs.to(torch.promote_types(A_logs.dtype, torch.float32)))
        A, D = (tensor.unflatten(0, (-1, self.width)) for tensor in (A, D))
        return tuple(tensor[sets] for tensor in (x_proj, dt_proj, bias.to(A.dtype), A, D))

    def forward(self, grid: Tensor) -> Tensor:
        x = self.conv2d(self.in_proj(grid).permute(0, 3, 1, 2))
        x = F.silu(x.permute(0, 2, 3, 1))  # (B, H, W, d)
        return self.out_proj(self.out_norm(self.scan(x)))

    def scan(self, x: Tensor) -> Tensor:
        """Return what the scans make of x, (B, H, W, d), at each token's own place."""
        raise NotImplementedError


class CrossScan(GridMixer):
    """VMamba's mixer (SS2D): the sum of four scans over sequences of H W tokens, under the official names."""

    def __init__(self, dim: int, ssm_ratio: float, state_dim: int, backend: str):
        super().__init__(dim, ssm_ratio, state_dim, backend)
        self.add_scan(FIRST, DIRECTIONS, 2)

    def scan(self, x: Tensor) -> Tensor:
        rows = self.both_ways(x.flatten(1, 2), 0).unflatten(1, x.shape[1:3])
        turned = x.transpose(1, 2)  # column after column; the only copy that is made
        columns = self.both_ways(turned.reshape(len(x), -1, self.width), 1).unflatten(1, turned.shape[1:3])
        return rows + columns.transpose(1, 2)

    def both_ways(self, tokens: Tensor, axis: int) -> Tensor:
        """Return the sum of the scans over tokens (B, L, d) from the first to the last and back; axis 1: columns."""
        x_proj, dt_proj, bias, A, D = self.scan_parameters(FIRST, slice(axis, None, 2))
        selected = F.linear(tokens, x_proj.flatten(0, 1)).unflatten(-1, (2, -1)).transpose(1, 2)
        ranks, B, C = selected.split((self.rank, self.state_dim, self.state_dim), -1)  # each (B, 2, L, ..)
        delta = torch.stack([F.linear(ranks[:, k], dt_proj[k]) for k in range(2)], 1)
        u = tokens[:, None].expand_as(delta)
        y = scan2d(
            *(one_row(part) for part in (u, delta)),
            A,
            *(one_row(part) for part in (B, C)),
            directions=("right", "left"),
            delta_bias=bias,
            delta_softplus=True,
            backend=self.backend,
        )
        return torch.addcmul(y.sum(1)[:, :, 0].transpose(1, 2), tokens, D.sum(0).to(tokens.dtype))


def one_row(tokens: Tensor) -> Tensor:
    """(B, K, L, C) -> (B, K, C, 1, L): sequences as grids of one row."""
    return tokens.transpose(2, 3)[:, :, :, None]


class CornerScan(GridMixer):
    """V2M's scan of the plane in VMamba's block: the sum over four corners of a row pass and then a column pass.

    sets: sets of parameters of either pass: 1 (all corners share one), 2 (one for each direction, so as many as VMamba
    has) or 4 (one for each corner). Corners whose row pass is the same share it: there are two, or four with 4 sets.
    conv_between: taps of a causal depthwise convolution, with its SiLU, between the passes, 0 for none. norm_between:
    a layer normalisation before that. Raises UserError for another number of sets.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float,
        state_dim: int,
        backend: str,
        *,
        sets: int,
        conv_between: int,
        norm_between: bool,
    ):
        super().__init__(dim, ssm_ratio, state_dim, backend)
        if sets not in ROWS:
            raise UserError(f"sets {sets} is unknown: choose one of {', '.join(map(str, ROWS))}")
        self.sets = sets
        for suffix in (FIRST, SECOND):
            self.add_scan(suffix, sets, 1)
        self.norm_between = nn.LayerNorm(self.width) if norm_between else None
        self.conv_between = None
        if conv_between:
            channels = sets * self.width
            # ``short_conv`` uses the weights; the module draws and names them.
            self.conv_between = nn.Conv1d(channels, channels, conv_between, groups=channels)

    def scan(self, x: Tensor) -> Tensor:
        return self.corner_branches(x).sum(1)

    def corner_branches(self, x: Tensor) -> Tensor:
        """Return the branch of every corner, (B, H, W, d) -> (B, 4, H, W, d).

        They are top left, bottom left, top right, bottom right.
        """
        passed = self.run_pass(x[:, None], FIRST, "B", ROWS[self.sets])
        if self.norm_between is not None:
            passed = self.norm_between(passed)
        if self.conv_between is None:
            passed = passed.repeat_interleave(len(COLUMNS) // passed.shape[1], 1)
        else:
            weight, bias = (
                self._of_groups(tensor.unflatten(0, (-1, self.width)), len(COLUMNS))
                for tensor in (self.conv_between.weight[:, 0], self.conv_between.bias)
            )
            backend = "reference" if self.backend == "reference" else "auto"
            passed = short_conv(passed, weight, bias, COLUMNS, backend)
        return self.run_pass(passed, SECOND, "C", COLUMNS)

    def run_pass(self, sources: Tensor, suffix: str, chosen: str, directions: tuple[str, ...]) -> Tensor:
        """Scan (B, 1 or K, H, W, d) in K directions -> (B, K, H, W, d), the skip added."""
        groups = len(directions)
        x_proj, dt_proj, bias, A, D = self.scan_parameters(suffix)
        selected = self._linear(sources, x_proj, groups)
        ranks, matrix = selected.split((self.rank, self.state_dim), -1)
        parts = (sources, self._linear(ranks, dt_proj, groups), matrix)
        u, delta, matrix = (part.expand(-1, groups, -1, -1, -1).permute(0, 1, 4, 2, 3) for part in parts)
        A, bias, D = (self._of_groups(tensor, groups) for tensor in (A, bias, D))
        y = scan2d(
            u,
            delta,
            A,
            **{chosen: matrix},
            directions=directions,
            delta_bias=bias,
            delta_softplus=True,
            backend=self.backend,
        )
        return torch.addcmul(y, u, D[..., None, None].to(u.dtype)).permute(0, 1, 3, 4, 2)

    def _of_groups(self, tensor: Tensor, groups: int) -> Tensor:
        """(sets, ..) -> (K, ..): group k takes set k modulo their number."""
        if self.sets == 1:
            return tensor.expand(groups, *tensor.shape[1:])
        return tensor if groups == self.sets else tensor.repeat(groups // self.sets, *[1] * (tensor.dim() - 1))

    def _linear(self, x: Tensor, weights: Tensor, groups: int) -> Tensor:
        """(B, 1 or K, H, W, I) -> (B, 1 or K, H, W, O): 1 where one source and one weight serve all groups."""
        if self.sets == 1:
            return F.linear(x, weights[0])
        pairs = zip(x.expand(-1, groups, -1, -1, -1).unbind(1), self._of_groups(weights, groups), strict=True)
        return torch.stack([F.linear(part, weight) for part, weight in pairs], 1)
