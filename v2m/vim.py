"""Vim: a plain, isotropic network of Mamba blocks, and V2M's, which is the same network with another mixer.

Vision Mamba, arXiv 2401.09417, section 3 and table 1 (vim_base.py): patches of 16 x 16 and a class token in the middle
of the sequence. V2M, arXiv 2410.10382, puts its mixer of the plane (mixer.py) in the place of Vim's and takes the mean
over the tokens; its figure has an MLP behind the mixer (``mlp_ratio``), its release has none.

Tokens travel as a grid (B, H, W, E). Names of parameters are those of the official checkpoints.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError
from v2m.class_tokens import insert_cross, resize_cross, resize_grid, split_cross
from v2m.mixer import require_choice
from v2m.passes import ScanMixer
from v2m.vim_base import INITIALISATION, VimBase

# A row and a column of tokens in the grid; besides, none and the mean over the tokens, or one token in their sequence.
CROSSES = ("middle_cross", "edge_cross")
CLASS_TOKENS = ("mean", "middle", "edge", *CROSSES)


class VimMixer(ScanMixer):
    """(B, H, W, E) -> (B, H, W, E): the raster sequence scanned in both directions (v2), any H and W.

    The directions share the projections in and out and the gate; each has its own short convolution, time step, B, C,
    A and D. Their sum is halved.
    """

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
        for suffix in ("", "_b"):
            self.add_pass(suffix)

    def forward(self, grid: Tensor) -> Tensor:
        x, gate = self.project_in(grid.flatten(1, 2)[:, None])  # one row
        mixed = self.run_pass(x, ("right", "left"), ("", "_b")).sum(1)
        # Halving a weight is exact, so it is done there rather than on every token.
        return F.linear(mixed * gate[:, 0], self.out_proj.weight / 2).view(grid.shape)


class PatchEmbed(nn.Module):
    """(B, C, height, width) -> (B, H, W, E): one linear map of every patch."""

    def __init__(self, patch_size: int, embed_dim: int, in_channels: int):
        super().__init__()
        self.patch_size, self.in_channels = patch_size, in_channels
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return H and W of the tokens; UserError where the patches do not tile the image."""
        patch = self.patch_size
        if patch < 1 or any(side < patch or side % patch for side in image_size):
            raise UserError(
                f"patches of {patch} do not tile an image of {image_size[0]} x {image_size[1]}: choose sides that are "
                "multiples of patch_size"
            )
        return image_size[0] // patch, image_size[1] // patch

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise UserError(
                f"the network takes images (B, {self.in_channels}, height, width), got {tuple(images.shape)}: build "
                "it with their number of channels"
            )
        self.grid(tuple(images.shape[2:]))
        return self.proj(images).permute(0, 2, 3, 1)


class Vim(VimBase):
    """Images (B, C, height, width) -> logits (B, num_classes), or features where num_classes is 0.

    image_size: side, or (height, width), that the position embedding is made for; it is resized for other sizes.
    mixer: ``mixer(embed_dim, layer=i, backend=...)`` gives the module (B, H, W, E) -> (B, H, W, E) of block i.
    class_token: "mean" (none, the head reads the mean over the tokens), "middle" and "edge" (one token, in the middle
    or at the end of the raster sequence, which then is a grid of one row: not for mixers of the plane), "middle_cross"
    and "edge_cross" (V2M's, class_tokens.py: a row and a column of tokens, the head reads the one where they cross).
    ``drop_path`` grows linearly from 0 at the first block; ``initialisation`` is ``VimBase``'s. Raises UserError for an
    unknown choice, for numbers that cannot be used, for a mixer of the plane on a sequence and for patches that do not
    tile.
    """

    FREE_OF_DECAY = (
        *VimBase.FREE_OF_DECAY,
        *("A_2_log", "D_2"),  # of the second pass
        *("p2", "q2", "p3", "q3", "B2", "C1"),  # of the general recurrence
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_classes: int,
        mixer: Callable[..., nn.Module],
        in_channels: int = 3,
        class_token: str = "mean",
        drop_path: float = 0.0,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        mlp_ratio: float = 0.0,
        initialisation: str = INITIALISATION,
        backend: str = "auto",
    ):
        require_choice("class_token", class_token, CLASS_TOKENS)
        if depth < 1 or not 0 <= drop_path < 1 or not 0 <= drop_rate < 1:
            raise UserError(
                f"depth {depth}, drop_path {drop_path}, drop_rate {drop_rate}: give 1 block or more, and rates of 0 or "
                "more, below 1"
            )
        patch_embed = PatchEmbed(patch_size, embed_dim, in_channels)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        grid_size = patch_embed.grid(size)
        extra = {"mean": 0, "middle": 1, "edge": 1}.get(class_token, sum(grid_size) + 1)
        super().__init__(
            tokens=patch_embed,
            length=math.prod(grid_size) + extra,
            class_tokens=extra,
            embed_dim=embed_dim,
            depth=depth,
            num_classes=num_classes,
            mixer=lambda i: mixer(embed_dim, layer=i, backend=backend),
            drop_path=drop_path,
            drop_rate=drop_rate,
            norm_eps=norm_eps,
            mlp_ratio=mlp_ratio,
            initialisation=initialisation,
        )
        self.class_token, self.grid_size = class_token, grid_size
        if class_token in ("middle", "edge") and getattr(self.layers[0].mixer, "plane", False):
            raise UserError(
                f"class_token {class_token} makes the grid one row, in which no column has a past, and this mixer is "
                f"one of the plane: choose {class_token}_cross or mean"
            )

    def crossing(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the place, (row, column), in a grid of (H, W) where a row and a column of class tokens cross."""
        return size if self.class_token == "edge_cross" else (size[0] // 2, size[1] // 2)

    def with_class_tokens(self, grid: Tensor, tokens: Tensor | None) -> Tensor:
        """(B, H, W, E) -> the grid with its class tokens (1, 1 or H + W + 1, E): a sequence is a grid of one row."""
        if tokens is None:
            return grid
        if self.class_token in CROSSES:
            return insert_cross(grid, tokens, *self.crossing(grid.shape[1:3]))
        sequence, place = grid.flatten(1, 2), self.place(grid.shape[1:3])
        token = tokens.expand(len(sequence), -1, -1)
        return torch.cat([sequence[:, :place], token, sequence[:, place:]], 1)[:, None]

    def without_class_tokens(self, grid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Undo ``with_class_tokens``: the patches (B, H, W, E) and the class tokens (B, 0 or more, E)."""
        if self.class_token == "mean":
            return grid, grid.flatten(1, 2)[:, :0]
        if self.class_token in CROSSES:
            return split_cross(grid, *self.crossing(size))
        sequence, place = grid.flatten(1, 2), self.place(size)
        patches = torch.cat([sequence[:, :place], sequence[:, place + 1 :]], 1)
        return patches.unflatten(1, size), sequence[:, place : place + 1]

    def place(self, size: tuple[int, int]) -> int:
        """Return where the one class token stands in the raster sequence of a grid."""
        length = size[0] * size[1]
        return length if self.class_token == "edge" else length // 2

    def _positions(self, size: tuple[int, int]) -> Tensor:
        """Return the position embedding of a grid with its class tokens, (1, rows, columns, E)."""
        if self.class_token in CROSSES:
            rows = self.grid_size[0] + 1
        else:
            rows = self.grid_size[0] if self.class_token == "mean" else 1
        own = self.pos_embed.unflatten(1, (rows, -1))
        if size == self.grid_size:
            return own
        patches, tokens = self.without_class_tokens(own, self.grid_size)
        if self.class_token in CROSSES:
            tokens = resize_cross(tokens, self.grid_size, size)
        return self.with_class_tokens(resize_grid(patches, size), None if self.cls_token is None else tokens)

    def _cross(self, size: tuple[int, int]) -> Tensor | None:
        """Return the class tokens of a grid, (1, 1 or H + W + 1, E)."""
        if self.class_token in CROSSES and size != self.grid_size:
            return resize_cross(self.cls_token, self.grid_size, size)
        return self.cls_token

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patch tokens (B, H, W, E) and the class tokens (B, 0 or more, E) behind the last norm."""
        grid = self.patch_embed(images)
        size = tuple(grid.shape[1:3])
        stream = self.with_class_tokens(grid, self._cross(size)) + self._positions(size)
        return self.without_class_tokens(self.encode(stream), size)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, height, width) -> the patch tokens (B, E, H, W) behind the last norm, at any size patches tile."""
        return self._encode(images)[0].permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        patches, class_tokens = self._encode(images)
        if self.class_token == "mean":
            return self.head(patches.flatten(1, 2).mean(1))
        if self.class_token in CROSSES:  # the row's tokens stand before the column's
            row, _ = self.crossing(patches.shape[1:3])
            return self.head(class_tokens[:, patches.shape[2] + row])
        return self.head(class_tokens[:, 0])
