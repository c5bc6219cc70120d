"""A mixer by Roesser's model of the plane, which V2M starts from and simplifies to two passes (arXiv 2410.10382).

A state along rows, which reads both states of the left neighbour, and one along columns, which reads both of the upper
one (kernels/roesser): the recurrence that the authors' figure draws (motivation.png of github.com/wangck20/V2M). That
the step sizes, B and C are chosen by the token and that the couplings have rank one is our reading.

It has V2M's parameters and, for each channel, the six vectors that the simplification drops: the two of A2, the two of
A3, B2 and C1. B2 and C1 begin at the constants that V2M's release has in their place, the B of its column pass and the
C of its row pass: 1. A2 begins at 0 and A3 at delta2 1 1^T: the rows are scanned, and the columns take each row's
result one token below it, so that every token sees its whole quadrant and no state can grow on a loop; training decides
what the way back is worth. That is not V2M's mixer: convolutions, skip and gate stand around the whole recurrence, not
between its halves, and both halves choose by the same token. Nobody has published this mixer; it is ours, for
comparison.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.kernels.roesser import roesser_scan
from v2m.mixer import FIRST, SECOND, require_choice
from v2m.passes import ScanMixer

# The axes of (B, H, W, .) to mirror so that a corner becomes the top left, by the number of corners.
MIRRORED = {1: ((),), 2: ((), (1, 2)), 4: ((), (1,), (2,), (1, 2))}
VECTORS = {"p2": 0.0, "q2": 1.0, "p3": 1.0, "q3": 1.0, "B2": 1.0, "C1": 1.0}


class RoesserMixer(ScanMixer):
    """(B, H, W, E) -> (B, H, W, E), any H and W; corners: 1 (top left), 2 (opposite ones) or 4."""

    plane = True

    def __init__(
        self,
        embed_dim: int,
        layer: int = 0,
        *,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        corners: int = 4,
        backend: str = "auto",
    ):
        super().__init__(embed_dim, state_dim, expand, conv_kernel, backend)
        require_choice("corners", corners, tuple(MIRRORED))
        self.corners = corners
        self.add_pass(FIRST, "B")
        self.add_pass(SECOND, "C")
        self.D_2 = None  # one recurrence, one skip
        for name, start in VECTORS.items():
            self.register_parameter(name, nn.Parameter(torch.full((self.width, state_dim), start)))

    def forward(self, grid: Tensor) -> Tensor:
        x, gate = self.project_in(grid)
        corners = [x[:, 0].flip(axes) for axes in MIRRORED[self.corners]]
        branches = self.recurrence(torch.cat(corners)).chunk(self.corners)
        mixed = sum(branch.flip(axes) for branch, axes in zip(branches, MIRRORED[self.corners], strict=True))
        weight = self.out_proj.weight / 2 if self.corners > 1 else self.out_proj.weight
        return F.linear(mixed * gate[:, 0], weight)

    def recurrence(self, x: Tensor) -> Tensor:
        """Return what the top left corner sees of (B, H, W, D), the skip added."""
        u = self._convolved(x[:, None], [self.conv1d], ("right",))
        u = self._convolved(u, [self.conv1d_2], ("down",))[:, 0]
        selected = [self.x_proj(u), self.x_proj_2(u)]  # (B, H, W, R + N)
        deltas = [
            F.softplus(layer(part[..., : self.rank]))
            for layer, part in zip((self.dt_proj, self.dt_proj_2), selected, strict=True)
        ]
        B1, C2 = (part[..., self.rank :].permute(0, 3, 1, 2) for part in selected)
        vectors = {name: getattr(self, name) for name in VECTORS}
        images = (tensor.permute(0, 3, 1, 2) for tensor in (u, *deltas))
        decays = (-torch.exp(log) for log in (self.A_log, self.A_2_log))
        backend = "reference" if self.backend == "reference" else "auto"
        y = roesser_scan(*images, *decays, B1=B1, C2=C2, **vectors, backend=backend)
        return torch.addcmul(y.permute(0, 2, 3, 1), u, self.D.to(u.dtype))
