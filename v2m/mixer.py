"""V2M's mixer: a selective state space model of the plane, seen from the corners of the image.

V2M (arXiv 2410.10382) splits the state of a token into a part that comes along its row and a part that comes along
its column, and simplifies that to two selective scans, one after the other: from a corner, first along every row,
then along every column. So a token is reached by the whole rectangle between it and the corner. For one corner

    x, z = in_proj(tokens);   u = silu(conv(x))                      the rows of the grid, C = 1
    h_j = exp(delta_j A) h_{j-1} + delta_j B_j u_j;   p = (sum(h_j) + D u_j) silu(z)
    v = silu(conv_2(p))                                              its columns, B = 1
    g_i = exp(delta2_i A2) g_{i-1} + delta2_i v_i;   q = (<C2_i, g_i> + D2 v_i) silu(z)

and the mixer returns ``out_proj(sum of q over the corners / 2)``, all corners sharing their weights. Every scan runs
on the grid where it lies: nothing is flipped, transposed or copied, and the two corners that begin with the same row
pass share it, so four corners are two row passes and four column passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError
from v2m.passes import ScanMixer
from v2m.windows import from_windows, to_windows

# By the number of corners: the row passes, and the column passes that follow each of them. Two corners lie opposite
# each other. "right" and "down" leave the top left.
ROWS = {1: ("right",), 2: ("right", "left"), 4: ("right", "left")}
COLUMNS = {1: ("down",), 2: ("down", "up"), 4: ("down", "up", "down", "up")}
COMPOSITIONS = ("sequential", "parallel")
ORDERS = ("rows_first", "rotated")
# The first and the second pass from the top left, and from the corners that quarter turns bring there.
ROTATED = ("right", "down", "left", "up"), ("down", "left", "up", "right")
FIRST, SECOND = "", "_2"  # suffixes of the parameters


def require_choice(name: str, value, choices: Sequence) -> None:
    """Raise UserError unless ``value`` is one of ``choices``."""
    if value not in choices or isinstance(value, bool):  # True is 1 to Python
        raise UserError(f"{name} {value!r} is unknown: choose one of {', '.join(map(str, choices))}")


class V2MMixer(ScanMixer):
    """(B, H, W, E) -> (B, H, W, E), any H and W.

    corners: 1 (top left), 2 (top left, bottom right) or 4.
    order: "rows_first" from every corner, or "rotated", as if the image were turned a quarter for each corner: rows
    first from two of them, columns first from the others, so four passes of either kind; turning the input a quarter
    then turns the output.
    composition: "sequential", the paper's, or "parallel", scans of the same tokens along rows and along columns, added:
    our stand-in for the paper's comparison with one-dimensional scans, whose form is not known. C stays 1 in the one
    and B in the other, so that the parameters are equal.
    norm_between: an RMSNorm between the passes (in the paper's figure, not in its release).
    window: the grid is cut into windows of so many tokens a side, each a plane of its own; 0 is none, a sequence gives
    one for each layer.
    Raises UserError for an unknown choice.
    """

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
        order: str = "rows_first",
        composition: str = "sequential",
        norm_between: bool = False,
        window: int | Sequence[int] = 0,
        backend: str = "auto",
    ):
        super().__init__(embed_dim, state_dim, expand, conv_kernel, backend)
        require_choice("corners", corners, tuple(ROWS))
        require_choice("order", order, ORDERS)
        require_choice("composition", composition, COMPOSITIONS)
        if order == "rotated" and (corners, composition) != (4, "sequential"):
            raise UserError("order rotated turns the image for each of four corners: set corners 4, sequential")
        self.corners, self.order, self.composition = corners, order, composition
        self.window = window_of_layer(window, layer)
        self.add_pass(FIRST, "B")
        self.add_pass(SECOND, "C")
        self.norm_between = nn.RMSNorm(self.width, 1e-5) if norm_between else None

    def forward(self, grid: Tensor) -> Tensor:
        size = grid.shape[1:3]
        tokens = to_windows(grid, self.window) if self.window else grid
        x, gate = self.project_in(tokens)
        mixed = self.parallel(x) if self.composition == "parallel" else self.corner_branches(x, gate).sum(1)
        # Halving a weight is exact, so it is done there rather than on every token. One corner is not a sum.
        weight = self.out_proj.weight / 2 if self.corners > 1 else self.out_proj.weight
        mixed = F.linear(mixed * gate[:, 0], weight)
        return from_windows(mixed, self.window, size) if self.window else mixed

    def corner_branches(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the branch of every corner before its last gate: (B, 1, H, W, D) -> (B, corners, H, W, D).

        Of four: top left, bottom left, top right, bottom right; rotated: clockwise.
        """
        firsts, seconds = ROTATED if self.order == "rotated" else (ROWS[self.corners], COLUMNS[self.corners])
        between = self.run_pass(x, firsts, (FIRST,), "B") * gate
        if self.norm_between is not None:
            between = self.norm_between(between)
        return self.run_pass(between, seconds, (SECOND,), "C")

    def parallel(self, x: Tensor) -> Tensor:
        """Return the sum of scans of the same tokens along rows and along columns, (B, H, W, D)."""
        rows = self.run_pass(x, ROWS[self.corners], (FIRST,), "B")
        columns = self.run_pass(x, COLUMNS[min(self.corners, 2)], (SECOND,), "C")
        return rows.sum(1) + columns.sum(1)


def window_of_layer(window: int | Sequence[int], layer: int) -> int:
    """Return the side of the windows of a layer; UserError where it is negative or the list too short."""
    if not isinstance(window, int | float):
        if layer >= len(window):
            raise UserError(f"window has {len(window)} entries, layer {layer} needs one: give one for each layer")
        window = window[layer]
    if not isinstance(window, int) or window < 0:
        raise UserError(f"window {window} is no number of tokens: give those of a side, or 0 for the whole grid")
    return window


class ReleasedMixer(ScanMixer):
    """(B, P, P, E) -> (B, P, P, E): what V2M's released code computes, kept for comparison, its defects included.

    Four copies of the tokens pass ``in_proj``: the grid and its transpose, each also with its rows reversed. Of each,
    rows are scanned and then columns. The results are left transposed against the tokens that they are added to, and
    the reversed ones are reversed along both axes afterwards although they were along one; so the corners are the
    top left twice, the top right and the bottom left (https://github.com/wangck20/V2M, ``bimamba_type="2d"``). The
    scan, the convolution and the parameters are those of ``V2MMixer``; that the release starts the second pass
    otherwise is the network's ``initialisation``. Raises UserError where the grid is not square.
    """

    plane = True

    def __init__(
        self,
        embed_dim: int,
        layer: int = 0,
        *,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        backend: str = "auto",
    ):
        super().__init__(embed_dim, state_dim, expand, conv_kernel, backend)
        self.add_pass(FIRST, "B")
        self.add_pass(SECOND, "C")

    def forward(self, grid: Tensor) -> Tensor:
        if grid.shape[1] != grid.shape[2]:
            raise UserError(
                f"the mixer as released takes square grids only, got {grid.shape[1]} x {grid.shape[2]}: choose "
                "model=v2m-t, or square images"
            )
        turned = grid.transpose(1, 2)
        x, gate = self.project_in(torch.cat([grid, turned, grid.flip(2), turned.flip(2)]))
        rows = self.run_pass(x, ("right",), (FIRST,), "B") * gate
        columns = self.run_pass(rows, ("down",), (SECOND,), "C") * gate
        right, down, left, up = columns[:, 0].chunk(4)
        ahead = right.transpose(1, 2) + down
        back = left.transpose(1, 2) + up
        return F.linear(ahead + back.flip(1, 2), self.out_proj.weight / 2)
