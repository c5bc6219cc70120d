"""OPERA above a masked-image space, "OPERA-MAE" of Table 11 (eq. 14-15), and the masked autoencoder below it alone.

    J = J_mask(Y) + J_self(g(Y)) + J_full(h(g(Y)))

    tokens = backbone(class token, visible patches)     three quarters of a view's patches are hidden
    y      = the class token of ``tokens``              z, q, c from y as in ``hierarchy``, arrangement "hierarchy"
    k      = momentum encoder's, of the whole other view
    J_mask = |decoder(tokens, mask tokens) - pixels|^2  mean over the hidden patches of both views and of all ranks

The masked autoencoder is MAE's (arXiv 2111.06377, sections 3 and A.1): the encoder sees nothing of a hidden patch, the
decoder is a narrow ViT with a mask token for each of them and fixed positions, the pixels of a patch are normalised
by its own mean and deviation.

    masked             MAE alone: no instances, no classes
    masked-hierarchy   OPERA-MAE

What the paper leaves open, and our interpretation: the weight of J_mask (``weight``: 1); whether the upper spaces see
the masked view or the whole one (masked: one pass of the encoder, MAE's cost) and by which token (the class token, as
in our other rows); the views (the two of the instance objective, both masked); the decoder (MAE's); whether the patch
projection trains (``train_patches``: it does, MAE's; MoCo-v3 fixes it).
"""

from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from opera.backbones import BUILDERS, sine_cosine_positions
from opera.hierarchy import Hierarchy, mean_over_ranks
from opera.views import Key
from shared.data.keyed import keyed_bits, stream
from shared.errors import UserError

MASKED_ARRANGEMENTS = ("masked", "masked-hierarchy")
HIDING = stream("opera.hiding")
SMALLEST_VARIANCE = 1e-6  # added to that of a patch's pixels


class MaskedTerms(NamedTuple):
    """The objective and its parts, 0-d each; a part that the arrangement does not have is 0."""

    total: Tensor
    instance: Tensor  # J_self
    classes: Tensor  # J_full
    masked: Tensor  # J_mask


class Decoder(nn.Module):
    """Visible tokens -> the pixels of the hidden patches: MAE's decoder on a grid of patches.

    inputs: width of the encoder. pixels: numbers in a patch. width, depth, heads: of the decoder; UserError for a width
    that neither its positions nor its heads divide, and for a depth below 1.
    """

    def __init__(self, grid: tuple[int, int], inputs: int, pixels: int, width: int, depth: int, heads: int):
        super().__init__()
        if heads < 1 or width < 1 or width % heads or width % 4:
            raise UserError(
                f"objective.mask.width={width} with objective.mask.heads={heads}: set a width that is a multiple of "
                "both 4 and the heads"
            )
        if depth < 1:
            raise UserError(f"objective.mask.depth={depth} decodes nothing: set 1 or more")
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", sine_cosine_positions(*grid, width), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm, self.pixels = LayerNorm(width), nn.Linear(width, pixels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Return (B, hidden, pixels) from class token and visible tokens (B, 1 + visible, inputs).

        order: (B, patches) int64, the places of the visible patches, as in ``tokens``, then those of the hidden ones.
        """
        seen = self.embed(tokens)
        images, hidden = len(seen), order.shape[1] + 1 - seen.shape[1]
        masks = self.mask_token.to(seen.dtype).expand(images, hidden, -1)
        # Attention does not mind the order of tokens: each keeps its place by its position alone.
        first, others = (self.positions[:, :1].expand(images, -1, -1), gather_tokens(self.positions[:, 1:], order))
        row = torch.cat([seen, masks], 1) + torch.cat([first, others], 1)
        return self.pixels(self.norm(self.blocks(row)[:, -hidden:]))


class MaskedHierarchy(Hierarchy):
    """A ``Hierarchy`` on the class token of masked views, and the masked-image objective below it.

    backbone: a ViT of ``backbones``. classes, heads, temperature, loss_weights, denominator: as for ``Hierarchy``; the
    masked arrangement has no use for them. mask: ``ratio`` of the patches that are hidden, ``width``, ``depth``,
    ``heads`` of the decoder, ``weight`` of J_mask under either ``loss_weights``, ``train_patches``: whether the patch
    projection trains. Raises UserError as ``Hierarchy``, for a backbone without patches, and for a ratio that hides all
    of them or none.

    Which patches are hidden is a function of (seed, epoch, image, view) where ``forward`` gets such a key. Without one
    it is drawn from torch's generator on the CPU, in float64 whatever the network's type: ``module`` seeds that with
    keyed bits before each step, so a resumed run hides the same, yet two ranks other patches than one process.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        heads: dict,
        arrangement: str,
        temperature: float,
        mask: dict,
        loss_weights: str = "released",
        denominator: str = "all",
    ):
        above = arrangement == "masked-hierarchy"
        _check(backbone, classes, arrangement, mask)
        backbone.patch_embed.proj.requires_grad_(mask["train_patches"])
        below = "hierarchy" if above else "instance"
        super().__init__(backbone, classes, heads, below, temperature, loss_weights, denominator)
        self.arrangement, self.mask_weight = arrangement, mask["weight"]
        if not above:
            self.online.projector, self.predictor, self.momentum = nn.Identity(), None, None
        patches = backbone.patch_embed
        self.patch, self.patches = patches.patch_size, patches.num_patches  # pixels high and wide; how many
        self.hidden = round(mask["ratio"] * self.patches)
        size = {name: mask[name] for name in ("width", "depth", "heads")}
        pixels = 3 * self.patch[0] * self.patch[1]
        self.decoder = Decoder(patches.grid_size, backbone.num_features, pixels, **size)

    def compile_encoders(self) -> None:
        self.online.backbone.blocks.compile()  # all that masked views pass through in one piece
        if self.momentum is not None:
            self.momentum.backbone.compile()

    def order(self, images: int, view: int, key: Key | None = None) -> Tensor:
        """Return an order of each image's patches (B, patches) int64, on the CPU: the last ``hidden`` are hidden."""
        if key is None:
            drawn = torch.rand(images, self.patches, dtype=torch.float64, device="cpu")
            return drawn.argsort(dim=1, stable=True)
        seed, epoch, index = key
        bits = keyed_bits(HIDING, seed, epoch, index[:, None], view, np.arange(self.patches))
        return torch.from_numpy(bits.argsort(1, kind="stable"))

    def encoded(self, images: Tensor, places: Tensor) -> Tensor:
        """Return the class token and the tokens (B, 1 + n, C) of the patches at ``places`` (B, n), seeing no other."""
        vit = self.online.backbone
        patches = gather_tokens(vit.patch_embed(images) + vit.pos_embed[:, 1:], places)
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1).to(patches.dtype)
        return vit.norm(vit.blocks(torch.cat([first, patches], 1)))

    def spaces(self, first: Tensor, second: Tensor, key: Key | None = None) -> list[dict[str, Tensor]]:
        """Return y, z, q of either masked view, as far as the arrangement has them, its ``tokens`` and ``order``."""
        orders = [self.order(len(images), view, key) for view, images in enumerate((first, second))]
        order = torch.cat(orders).to(first.device)
        tokens = self.encoded(torch.cat([first, second]), order[:, : self.patches - self.hidden])
        views = []
        for rows, places in zip(tokens.chunk(2), order.chunk(2), strict=True):
            view = {"y": rows[:, 0], "tokens": rows, "order": places}
            if self.predictor is not None:
                view["z"] = self.online.projector(view["y"])
                view["q"] = self.predictor(view["z"])
            views.append(view)
        return views

    def forward(self, first: Tensor, second: Tensor, labels: Tensor, key: Key | None = None) -> MaskedTerms:
        """Return the objective of two views (B, 3, S, S) of the images with labels (B,) int64, -1 where there is none.

        Every rank gives its part of the batch and gets the objective of the whole. ``key``: seed, epoch, index (B,) of
        the images, by which patches are hidden.
        """
        views = self.spaces(first, second, key)
        instance, classes = self.terms(views, first, second, labels)
        masked = self.masked_term(views, first, second)
        weight = self.weights()
        total = self.mask_weight * masked + weight[0] * instance + weight[1] * classes
        return MaskedTerms(total, instance, classes, masked)

    def masked_term(self, views: list[dict[str, Tensor]], first: Tensor, second: Tensor) -> Tensor:
        """Return J_mask, 0-d, from the spaces of both views."""
        tokens, order = (torch.cat([view[name] for view in views]) for name in ("tokens", "order"))
        predicted = self.decoder(tokens, order)  # (2 B, hidden, pixels)
        pixels = gather_tokens(patch_pixels(torch.cat([first, second]), self.patch), order[:, -self.hidden :])
        errors = (predicted.to(pixels.dtype) - pixels).square().mean((1, 2))
        return mean_over_ranks(errors)


def patch_pixels(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return every patch's pixels (B, patches, pixels), float32 or wider, of mean 0 and deviation 1."""
    height, width = patch
    rows = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=height, q=width)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    variance, mean = torch.var_mean(rows, 2, keepdim=True)
    return (rows - mean) * (variance + SMALLEST_VARIANCE).rsqrt()


def gather_tokens(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows (B or 1, n, C) at each image's places (B, m) int64: (B, m, C)."""
    return torch.take_along_dim(rows, places[:, :, None], 1)


def _check(backbone: nn.Module, classes: int, arrangement: str, mask: dict) -> None:
    """Raise UserError for what cannot be masked."""
    if arrangement not in MASKED_ARRANGEMENTS:
        raise UserError(
            f"objective.arrangement={arrangement} masks nothing: choose one of {', '.join(MASKED_ARRANGEMENTS)}"
        )
    if arrangement == "masked-hierarchy" and classes < 2:
        raise UserError(
            f"arrangement={arrangement} needs labels of two classes or more: give a labelled set, or choose masked"
        )
    if not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"arrangement={arrangement} hides patches and this backbone has none: set model.backbone to one of "
            f"{', '.join(name for name in BUILDERS if name.startswith('vit'))}"
        )
    count, ratio = backbone.patch_embed.num_patches, mask["ratio"]
    if not 0 < ratio < 1 or not 0 < round(ratio * count) < count:
        raise UserError(
            f"objective.mask.ratio={ratio} hides all of {count} patches or none: set a part that does neither, as 0.75"
        )
    if not mask["weight"] > 0:
        raise UserError(f"objective.mask.weight={mask['weight']}: set it above 0, or choose another arrangement")
