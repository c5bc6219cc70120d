"""LocalVim, the base of V2M + local window: a plain network whose layers scan windows of the image as well.

LocalMamba, arXiv 2403.09338, sections 3 and 4 (https://github.com/hunto/LocalMamba): 20 layers, each with four scan
directions found by a search, out of the raster sequence ("h"), the columns one after the other ("v") and windows of 2
or 7 tokens a side ("w2", "w7"), each also backwards ("_flip"). Every direction has parameters of its own; what it
gives is weighted channel by channel by an attention over its mean token, then the directions are added. Positions are
learned and also rotary: the whole stream is rotated in front of every layer, the residual path included. The head reads
the mean token.

Parameters have the official names, except A_0_log (theirs: A_log_0); the tables of the rotation are computed.
"""

import re
from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError
from v2m.mixer import COLUMNS, FIRST, ROWS, SECOND, V2MMixer
from v2m.passes import ScanMixer
from v2m.vim import Vim
from v2m.vim_base import EMBEDDING_STD, INITIALISATION, forget_deltas
from v2m.windows import from_windows, to_windows

DIRECTION = re.compile(r"(h|v|w([1-9]\d*))(_flip)?")
ATTENTION_RATIO = 8  # channels over hidden channels of the attention
# Positions of the rotation run from 0 to this along either side, whatever the size of the grid.
ROTARY_SIDE = 14
ROTARY_BASE = 10_000.0
SCAN_PARAMETER = re.compile(r"(A|D)(_\d)+(_log)?")
CORNER_SUFFIXES = (SECOND, "_2_1", "_2_2", "_2_3")  # of the column passes of V2MLocalMixer


class ChannelAttention(nn.Module):
    """(B, L, D) -> (B, L, D): every channel times a weight between 0 and 1 that depends on the mean token."""

    def __init__(self, width: int):
        super().__init__()
        hidden = width // ATTENTION_RATIO
        self.norm = nn.LayerNorm(width)
        self.global_reduce = nn.Linear(width, hidden)
        self.channel_select = nn.Linear(hidden, width)
        for layer in (self.global_reduce, self.channel_select):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = self.norm(tokens).mean(1, keepdim=True)
        return tokens * torch.sigmoid(self.channel_select(F.gelu(self.global_reduce(mean))))


class LocalVimMixer(ScanMixer):
    """(B, H, W, E) -> (B, H, W, E), any H and W: the scans of one layer.

    directions: one list for each layer of names as "h", "v_flip", "w7"; ``layer`` picks. Windows that reach over the
    edge are filled up with zeros, which are scanned as well. Raises UserError for another name and for a list that is
    too short.
    """

    def __init__(
        self,
        embed_dim: int,
        layer: int = 0,
        *,
        directions: Sequence[Sequence[str]],
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        backend: str = "auto",
    ):
        super().__init__(embed_dim, state_dim, expand, conv_kernel, backend)
        if layer >= len(directions):
            raise UserError(
                f"directions has {len(directions)} entries, layer {layer} needs one: give one for each layer"
            )
        self.paths = _paths(directions[layer])
        for i in range(len(directions[layer])):
            self.add_pass(f"_{i}")
        self.attn = ChannelAttention(self.width)

    def forward(self, grid: Tensor) -> Tensor:
        x, gate = (part[:, 0] for part in self.project_in(grid))
        weighted = []
        for path, members in self.paths.items():
            sequence = to_sequence(x, path)[:, None, None]  # (B, 1, 1, L, D)
            ways, suffixes = [way for _, way in members], [f"_{i}" for i, _ in members]
            for y in self.run_pass(sequence, ways, suffixes)[:, :, 0].unbind(1):
                y = from_sequence(y, path, x.shape[1:3]) * gate
                weighted.append(self.attn(y.flatten(1, 2)))
        return self.out_proj(sum(weighted)).view(grid.shape)


class V2MLocalMixer(V2MMixer):
    """(B, H, W, E) -> (B, H, W, E): V2M's mixer in LocalVim's place, our interpretation of "V2M + local window".

    Nothing of it is published but its cost. From LocalVim: a layer may scan windows instead of the grid, every corner
    has parameters of its own (in its column pass; the row pass is shared), and what a corner gives is weighted by the
    attention over its mean token. ``window`` is the side for each layer, 0 for none. Raises UserError as ``V2MMixer``.
    """

    def __init__(
        self,
        embed_dim: int,
        layer: int = 0,
        *,
        window: int | Sequence[int],
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        backend: str = "auto",
    ):
        sizes = {"state_dim": state_dim, "expand": expand, "conv_kernel": conv_kernel}
        super().__init__(embed_dim, layer, window=window, backend=backend, **sizes)
        for suffix in CORNER_SUFFIXES[1:]:
            self.add_pass(suffix, "C")
        self.attn = ChannelAttention(self.width)

    def forward(self, grid: Tensor) -> Tensor:
        size = grid.shape[1:3]
        x, gate = self.project_in(to_windows(grid, self.window) if self.window else grid)
        weighted = []
        for branch in (self.corner_branches(x, gate) * gate).unbind(1):
            whole = from_windows(branch, self.window, size) if self.window else branch
            weighted.append(self.attn(whole.flatten(1, 2)))
        return self.out_proj(sum(weighted)).view(grid.shape)

    def corner_branches(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the branches as ``V2MMixer`` does, each column pass with parameters of its own."""
        rows = self.run_pass(x, ROWS[self.corners], (FIRST,), "B") * gate
        return self.run_pass(rows, COLUMNS[self.corners], CORNER_SUFFIXES, "C")


def _paths(directions: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """Return for each path over the grid, "h", "v" or "w<side>", its (index, "right" or "left") in ``directions``."""
    paths: dict[str, list[tuple[int, str]]] = {}
    for i, direction in enumerate(directions):
        parts = DIRECTION.fullmatch(direction)
        if parts is None:
            raise UserError(f"direction {direction!r} is unknown: give h, v or w<side>, with or without _flip")
        paths.setdefault(parts[1], []).append((i, "left" if parts[3] else "right"))
    return paths


def to_sequence(grid: Tensor, path: str) -> Tensor:
    """(B, H, W, D) -> (B, L, D) in the order of a path; windows run in raster order and are raster inside."""
    if path == "h":
        return grid.flatten(1, 2)
    if path == "v":
        return grid.transpose(1, 2).flatten(1, 2)
    return to_windows(grid, int(path[1:])).reshape(len(grid), -1, grid.shape[-1])


def from_sequence(tokens: Tensor, path: str, size: tuple[int, int]) -> Tensor:
    """Undo ``to_sequence`` for a grid of ``size`` (H, W): (B, L, D) -> (B, H, W, D)."""
    height, width = size
    if path == "h":
        return tokens.unflatten(1, (height, width))
    if path == "v":
        return tokens.unflatten(1, (width, height)).transpose(1, 2)
    side = int(path[1:])
    return from_windows(tokens.reshape(-1, side, side, tokens.shape[-1]), side, size)


def rotation(size: tuple[int, int], channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, (H, W, channels / 2), of the angle by which each pair of channels is turned.

    The first half of the pairs is turned by the row, the second by the column, each pair more slowly than the one
    before, from 1 rad per position (of ``ROTARY_SIDE``) down (RoPE, arXiv 2104.09864). Device and dtype are ``like``'s.
    """
    # The official tables of another grid than the trained one are resized ones; here the positions are spread anew.
    count = channels // 4
    steps = torch.arange(count, device=like.device, dtype=like.dtype) / count
    frequencies = ROTARY_BASE**-steps
    rows, columns = (
        torch.arange(n, device=like.device, dtype=like.dtype)[:, None] * (ROTARY_SIDE / n) * frequencies for n in size
    )
    angles = torch.cat(
        [rows[:, None].expand(*size, count), columns[None].expand(*size, count)], -1
    )  # (H, W, channels / 2)
    return angles.cos(), angles.sin()


def rotate(grid: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of (B, H, W, E) by its angle."""
    first, second = grid.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1).flatten(-2)


class LocalVim(Vim):
    """Images (B, C, height, width) -> logits (B, num_classes): ``Vim`` without a class token, its stream rotated.

    Arguments, shapes and errors are ``Vim``'s; ``mixer`` may also be V2M's. initialisation: "mamba", or "local_vim",
    as the official network starts: in_proj and, of every direction, x_proj and the weights of the step sizes are drawn
    anew with a standard deviation of 0.020, the biases of the step sizes are 0 (its scans forget at once), and the
    patch convolution is left as PyTorch draws it (0.021 for patches of 16). Raises UserError besides for a class token
    and for an embed_dim that 4 does not divide.
    """

    INITIALISATIONS = ("mamba", "local_vim")

    def __init__(self, *, embed_dim: int, class_token: str = "mean", initialisation: str = INITIALISATION, **arguments):
        if class_token != "mean" or embed_dim % 4:
            raise UserError(
                f"LocalVim has no class token and turns channels in fours, got {class_token!r} and {embed_dim}: "
                "choose class_token mean and a multiple of 4"
            )
        super().__init__(embed_dim=embed_dim, class_token=class_token, initialisation=initialisation, **arguments)
        if initialisation == "local_vim":
            self._reset_as_released()

    def _reset_as_released(self) -> None:
        for layer in self.layers:
            for name, part in layer.mixer.named_children():
                if name.startswith(("in_proj", "x_proj", "dt_proj")):
                    trunc_normal_(part.weight, std=EMBEDDING_STD)
            forget_deltas(layer.mixer)
        self.patch_embed.proj.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Return ``Vim``'s names and A and D of every direction."""
        scans = {n for n, _ in self.named_parameters() if SCAN_PARAMETER.fullmatch(n.rpartition(".")[2])}
        return super().no_weight_decay() | scans

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patch tokens (B, H, W, E) behind the last norm and, as class tokens, none of (B, 0, E)."""
        grid = self.patch_embed(images)
        size = tuple(grid.shape[1:3])
        stream = self.to_stream(grid + self._positions(size))
        angles = rotation(size, self.num_features, stream)
        for layer in self.layers:
            stream = layer(rotate(stream, *angles))
        patches = self.norm_f(stream)
        return patches, patches.flatten(1, 2)[:, :0]
