"""GlobalMamba's idea: an image becomes a sequence of tokens that runs from low to high frequency.

arXiv 2410.10316, method section, and https://github.com/wangck20/GlobalMamba: the discrete cosine transform of
the image, F(u, v); K spectra F^k(u, v) = I(f_k - f(u, v)) F(u, v), each holding the ones before it; their
inverses x^k, low-passed images; each shrunk by 2^(K-k) and cut into patches by one shared convolution; raster
order inside a level, levels one after the other. At 224 pixels, patches of 16 and K = 4: 1 + 9 + 49 + 196 tokens.

Transform, mask, inverse and shrinking are products with constant matrices, and most of it is never computed: a
level keeps the corner F[:h, :w] of the spectrum and is then shrunk, so x'_k = P (F[:h, :w] * mask) Q^T with
P = (shrinking) (inverse transform), p g by h for g patches of p pixels; the top level is the image itself.

Readings (``variant``): ``as_written`` shrinks images, then tokenises them. The size h / 2^(K-k) that the paper
gives is no multiple of the patch in its own case (28 pixels, patches of 16), so level k has p floor(g / 2^(K-k))
pixels. ``as_released`` convolves every low-passed image at full size and shrinks the tokens. Bands as in the
release in both (``spectrum.band_masks``).
"""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from globalmamba.spectrum import area_matrix, band_masks, bilinear_matrix, dct_matrix, nearest_patches, shrink_matrix
from shared.data.keyed import keyed_permutation
from shared.errors import UserError

CHOICES = {
    "variant": ("as_written", "as_released"),
    "bands": ("nested", "disjoint"),
    "order": ("low-high", "high-low", "random"),
    "content": ("frequency", "replicated", "resized", "averaged"),
}
LEVELS = range(2, 7)


def token_grids(image_size: tuple[int, int], patch_size: int, levels: int) -> tuple[tuple[int, int], ...]:
    """Return the grid (rows, columns) of tokens of every level, low to high: floor(patch grid / 2^(K-k)).

    Raises UserError for an image that is no whole number of patches, K outside 2..6 or a level without tokens.
    """
    size = "{} x {}".format(*image_size)
    if levels not in LEVELS:
        raise UserError(f"levels is {levels}: choose from 2 to 6 frequency levels")
    if patch_size < 1:
        raise UserError(f"patch_size is {patch_size}: give the pixels of a patch's side, 1 or more")
    if min(image_size) < patch_size:
        raise UserError(f"images of {size} are smaller than a patch of {patch_size}: lower patch_size")
    if any(side % patch_size for side in image_size):
        raise UserError(f"images of {size} are no whole number of patches of {patch_size}: change one of the two")
    rows, columns = (side // patch_size for side in image_size)
    if min(rows, columns) >> (levels - 1) == 0:
        most = min(rows, columns).bit_length()
        remedy = f"use at most {most} levels" if most in LEVELS else "use larger images or smaller patches"
        raise UserError(f"{levels} levels leave the lowest one of {rows} x {columns} patches empty: {remedy}")
    return tuple((rows >> shift, columns >> shift) for shift in reversed(range(levels)))


def token_order(grids: tuple[tuple[int, int], ...], order: str, seed: int) -> np.ndarray:
    """Return the places, in the sequence from low to high, of the tokens in the wanted order, (T,) int64."""
    counts = [rows * columns for rows, columns in grids]
    if order == "random":
        return keyed_permutation(sum(counts), seed)
    levels = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    return np.concatenate(levels[::-1] if order == "high-low" else levels)


class FrequencySerialization(nn.Module):
    """Images (B, C, H, W) -> tokens (B, T, embed_dim), levels from low to high frequency, raster inside a level.

    ``bands``: nested, each level holds the ones below (the paper's formula), or disjoint, only what it adds.
    ``order``: low-high, high-low (levels reversed, raster kept) or random, one permutation keyed by ``order_seed``.
    ``content``: frequency; resized: the same shrinking without the low-pass; averaged: shrunk without the low-pass by
    the mean over each pixel's area; replicated: the image's own patches, every lower level repeating the ones under
    the centres of its cells. The last three are controls.

    Transform and shrinking run in float32 even under autocast (float64 in a float64 module): products in bfloat16
    err 2 to 17 times as much as rounding their results does. Raises UserError for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        levels: int = 4,
        in_channels: int = 3,
        variant: str = "as_written",
        bands: str = "nested",
        order: str = "low-high",
        content: str = "frequency",
        order_seed: int = 0,
    ):
        super().__init__()
        chosen = {"variant": variant, "bands": bands, "order": order, "content": content}
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise UserError(f"{name} is {value!r}: choose from {', '.join(CHOICES[name])}")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.grids = token_grids(self.image_size, patch_size, levels)
        self.num_tokens = sum(rows * columns for rows, columns in self.grids)
        self.patch_size, self.levels, self.in_channels = patch_size, levels, in_channels
        self.variant, self.bands, self.order, self.content = variant, bands, order, content
        self.order_seed = order_seed
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self._place_constants()

    def extra_repr(self) -> str:
        size = "image_size={}x{}".format(*self.image_size)
        return f"{size}, levels={self.levels}, " + ", ".join(f"{n}={getattr(self, n)}" for n in CHOICES)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, T, embed_dim). Raises UserError for images of another size."""
        levels = [level.flatten(2).transpose(1, 2) for level in self.level_tokens(images)]  # (B, h_k w_k, E)
        tokens = torch.cat(levels, 1)
        return tokens if self.order == "low-high" else tokens.index_select(1, self.permutation)

    def level_tokens(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> K grids of tokens (B, embed_dim, h_k, w_k), low to high, whatever the order is."""
        return [self.proj(image.to(self.proj.weight.dtype)) for image in self.shrunk_images(images)]

    def shrunk_images(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> x'_k: K images (B, C, p h_k, p w_k), whose patches become the tokens."""
        pixels = self._pixels(images)
        with _without_autocast(images):
            source = self._spectrum(pixels) if self.content == "frequency" else pixels
            shrunk = [self._shrunk(source, level) for level in range(1, self.levels)]
            return shrunk + [self._shrunk(source, self.levels) if self._filters_top else pixels]

    def level_images(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> x^k: K low-passed images of full size, float32 or float64; for pictures."""
        pixels = self._pixels(images)
        if self.content != "frequency":
            return [pixels] * self.levels
        with _without_autocast(images):
            spectrum = self._spectrum(pixels)
            filtered = [self._inverse(spectrum, level) for level in range(1, self.levels)]
            return filtered + [self._inverse(spectrum, self.levels) if self._filters_top else pixels]

    @property
    def _filters_top(self) -> bool:
        """Whether the top level is more than the image itself."""
        return self.content == "frequency" and self.bands == "disjoint"

    def _pixels(self, images: Tensor) -> Tensor:
        """Return images in the dtype of the transform, after a check of their shape."""
        expected = (self.in_channels, *self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise UserError(
                f"expected images (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}: "
                "resize the data or set image_size and in_channels"
            )
        return images.to(torch.float64 if self.proj.weight.dtype == torch.float64 else torch.float32)

    def _spectrum(self, pixels: Tensor) -> Tensor:
        """Return F = D x D^T of every channel, (B, C, H, W)."""
        return self.dct_rows @ (pixels @ self.dct_columns.T)

    def _shrunk(self, source: Tensor, level: int) -> Tensor:
        """Return x'_k from the spectrum, or from the image where nothing is filtered."""
        if self.content == "replicated":
            rows, columns = getattr(self, f"rows_{level}"), getattr(self, f"columns_{level}")
            return source.index_select(2, rows).index_select(3, columns)
        left, right = getattr(self, f"left_{level}"), getattr(self, f"right_{level}")
        kept = source[..., : left.shape[1], : right.shape[1]]  # (B, C, h, w)
        if self.content == "frequency":
            kept = kept * getattr(self, f"mask_{level}")
        return left @ (kept @ right.T)

    def _inverse(self, spectrum: Tensor, level: int) -> Tensor:
        """Return x^k, the inverse transform of the masked spectrum."""
        mask = getattr(self, f"mask_{level}")
        h, w = mask.shape
        return self.dct_rows[:h].T @ ((spectrum[..., :h, :w] * mask) @ self.dct_columns[:w])

    def _constants(self) -> dict[str, np.ndarray]:
        """Return the constants of this configuration by buffer name, float64 or int64."""
        height, width = self.image_size
        constants = {"permutation": token_order(self.grids, self.order, self.order_seed)}
        if self.content == "frequency":
            masks = band_masks(height, width, self.levels, self.bands)
            inverses = dct_matrix(height).T, dct_matrix(width).T
            constants |= {"dct_rows": inverses[0].T, "dct_columns": inverses[1].T}
        (top_rows, top_columns), patch = self.grids[-1], self.patch_size
        for level, (rows, columns) in enumerate(self.grids, start=1):
            if level == self.levels and not self._filters_top:
                break
            if self.content == "replicated":
                constants[f"rows_{level}"] = nearest_patches(rows, top_rows, patch)
                constants[f"columns_{level}"] = nearest_patches(columns, top_columns, patch)
                continue
            shrinking = area_matrix if self.content == "averaged" else bilinear_matrix
            left = shrink_matrix(rows, top_rows, patch, self.variant, shrinking)
            right = shrink_matrix(columns, top_columns, patch, self.variant, shrinking)
            if self.content == "frequency":
                mask = masks[level - 1]
                mask = mask[: mask.any(1).nonzero()[0][-1] + 1, : mask.any(0).nonzero()[0][-1] + 1]
                left, right = left @ inverses[0][:, : mask.shape[0]], right @ inverses[1][:, : mask.shape[1]]
                constants[f"mask_{level}"] = mask.astype(np.float64)
            constants |= {f"left_{level}": left, f"right_{level}": right}
        return constants

    def _place_constants(self) -> None:
        """Register the constants, rounded once from float64, where the weights are."""
        weight = self.proj.weight
        dtype = np.float64 if weight.dtype == torch.float64 else np.float32
        for name, array in self._constants().items():
            array = np.ascontiguousarray(array, array.dtype if array.dtype.kind == "i" else dtype)
            self.register_buffer(name, torch.from_numpy(array).to(weight.device), persistent=False)

    def _apply(self, fn, recurse=True):
        """Move as every module does, then make the constants anew: .half().double() must not round them twice."""
        super()._apply(fn, recurse)
        self._place_constants()
        return self


def _without_autocast(images: Tensor):
    """Return a context in which products keep the dtype of their factors."""
    kind = images.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext()
