"""GlobalMamba-T/S/B: the frequency levels of an image pass VMamba's pyramid as grids of their own, then merge.

arXiv 2410.10316: K nested low-passed images x^k, shrunk to H / 2^(K-k), tokenised, scanned from low to high
frequency. How these levels pass a pyramid that halves its grid from stage to stage is in neither the paper nor
its release (https://github.com/wangck20/GlobalMamba, plain networks only). The interpretation here:

- VMamba's own stem tokenises every level: 224 pixels and K = 4 give grids of 7, 14, 28 and 56.
- In the first ``separate_stages`` stages the levels stand side by side. What acts on single tokens acts on all of
  them, convolutions (depthwise and down-sampling) on each grid alone, and each scan on one sequence: all levels
  from low to high, every grid by rows (or by columns), and the same sequence backwards.
- Down-sampling rounds up, so a grid never becomes empty; one of a single token stays so.
- Behind these stages, before the next down-sampling, ``merge`` leaves the top grid alone: ``add`` adds the others,
  enlarged bilinearly, ``add-nearest`` by repetition, ``drop`` leaves them out.

No parameter is new: an official VMamba initialises every part. ``interpretations_table`` counts the interpretations:
two separate stages are nearest to the printed FLOPs over the three sizes, hence the default.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from globalmamba.layout import Layout
from globalmamba.model_base import CHANNELS
from globalmamba.serialization import CHOICES, LEVELS, token_grids, token_order
from globalmamba.spectrum import band_masks, bilinear_matrix, dct_matrix
from globalmamba.vmamba import SIZES, VMamba
from shared.errors import UserError

MERGES = {"add": "bilinear", "add-nearest": "nearest", "drop": None}
SHRINKING = {"resized": "bilinear", "averaged": "area"}  # of controls without a low-pass
KEPT = 64  # sets of constants, a handful for every size of images
# The paper's table: parameters in millions and FLOPs in billions of VMamba and of GlobalMamba on it.
CLAIMS = {"tiny": ((30, 4.9), (30, 5.3)), "small": ((50, 8.7), (50, 9.5)), "base": ((89, 15.4), (89, 17.0))}


class GlobalVMamba(VMamba):
    """Images (B, in_channels, H, W) -> logits (B, num_classes), or stage outputs of the top level's grid.

    ``levels`` is K; ``bands``, ``order`` and ``content`` are those of ``FrequencySerialization``; the rest is
    VMamba's. Low-pass and shrinking run in float32 even under autocast, in float64 for float64 images.
    Raises UserError for choices that do not exist, and in ``forward`` for sizes that the levels do not divide.
    """

    def __init__(
        self,
        *,
        levels: int = 4,
        bands: str,
        order: str,
        content: str,
        separate_stages: int = 2,
        merge: str = "add",
        order_seed: int = 0,
        **vmamba,
    ):
        super().__init__(**vmamba)
        for name, value in (("bands", bands), ("order", order), ("content", content), ("merge", merge)):
            known = MERGES if name == "merge" else CHOICES[name]
            if value not in known:
                raise UserError(f"{name} is {value!r}: choose from {', '.join(known)}")
        if levels not in LEVELS:
            raise UserError(f"levels is {levels}: choose from {LEVELS[0]} to {LEVELS[-1]} frequency levels")
        stages = len(self.feature_info)
        if separate_stages not in range(1, stages + 1):
            raise UserError(f"separate_stages is {separate_stages}: choose from 1 to {stages} stages")
        self.levels, self.bands, self.order, self.content = levels, bands, order, content
        self.separate_stages, self.merge, self.order_seed = separate_stages, merge, order_seed
        self._kept: dict[tuple, tuple[Tensor, ...]] = {}

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the stem's grids (B, C, h_k, w_k) of all levels, from low to high."""
        height, width = images.shape[2:]
        token_grids((height, width), self.patch_size, self.levels)  # refuses levels without tokens
        unit = self.patch_size << (self.levels - 1)
        if height % unit or width % unit:
            raise UserError(
                f"{self.levels} levels in patches of {self.patch_size} do not divide images of {height} x {width}: "
                f"make both sides multiples of {unit}, or lower levels or patch_size"
            )
        if self.content == "replicated":
            top, cells = self.stem(images), [2**shift for shift in reversed(range(1, self.levels))]
            # The token under the centre of every cell of a lower level.
            return [top[:, :, cell // 2 :: cell, cell // 2 :: cell] for cell in cells] + [top]
        return [self.stem(level.to(images.dtype)) for level in self.level_images(images)]

    def level_images(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> x'_k, (B, C, H / 2^(K-k), W / 2^(K-k)), from low to high."""
        pixels = images.to(torch.promote_types(images.dtype, torch.float32))
        height, width = images.shape[2:]
        if self.content in SHRINKING:
            mode, scales = SHRINKING[self.content], reversed(range(1, self.levels))
            return [_resized(pixels, (height >> s, width >> s), mode) for s in scales] + [pixels]
        parts = _low_pass(height, width, self.levels, self.bands)
        low_pass = [
            self._constants((height, width, number), part, pixels.dtype, pixels.device)
            for number, part in enumerate(parts)
        ]
        # Tensors without data take the CPU's switch: autocast knows no such device.
        kind = images.device.type if images.device.type != "meta" else "cpu"
        with torch.autocast(kind, enabled=False):
            spectrum = low_pass[0][0] @ (pixels @ low_pass[0][1].T)  # F = D x D^T
            levels = []
            for left, mask, right in low_pass[1:]:
                kept = spectrum[..., : mask.shape[0], : mask.shape[1]] * mask
                levels.append(left @ (kept @ right.T))
        # A nested top level holds the whole spectrum: it is the image.
        return levels if self.bands == "disjoint" else [*levels, pixels]

    def _constants(
        self, key: tuple, arrays: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device
    ) -> Sequence[Tensor]:
        """Return arrays as tensors, rounded once from float64, the same ones again for the same key.

        Images may come in any size, so these are no buffers.
        """
        key = (*key, dtype, device)
        if key in self._kept:
            return self._kept[key]
        # What is made in inference mode could not be kept for a later backward.
        with torch.inference_mode(False):
            made = tuple(torch.tensor(array, dtype=dtype, device=device) for array in arrays)
        if all(type(tensor) is Tensor for tensor in made):  # torch.export runs on stand-ins
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = made
        return made

    def layout(self, grids: Sequence[Tensor]) -> Layout:
        plain = super().layout(grids)
        if len(grids) == 1 or self.order == "low-high":
            return plain
        orders = _permutation(plain.sizes, self.order, self.order_seed)
        return Layout(plain.sizes, *self._constants(plain.sizes, orders, torch.int64, grids[0].device))

    def after_blocks(self, stage: int, grids: list[Tensor]) -> list[Tensor]:
        if len(grids) == 1 or stage + 1 < self.separate_stages:
            return grids
        *lower, top = grids
        mode = MERGES[self.merge]
        if mode is not None:
            for grid in lower:
                top = top + _resized(grid, top.shape[2:], mode)
        return [top]


def _resized(images: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    return F.interpolate(images, tuple(size), mode=mode)


@functools.lru_cache(maxsize=16)
def _low_pass(height: int, width: int, levels: int, bands: str) -> list[tuple[np.ndarray, ...]]:
    """Return (D_H, D_W), then what makes each level of the spectrum: left (h, u), mask (u, v), right (w, v)."""
    cosines = dct_matrix(height), dct_matrix(width)
    parts = [cosines]
    for level, mask in enumerate(band_masks(height, width, levels, bands), start=1):
        shift = levels - level
        if shift == 0 and bands == "nested":
            break
        corner = mask.any(1).nonzero()[0][-1] + 1, mask.any(0).nonzero()[0][-1] + 1
        left, right = (
            bilinear_matrix(len(matrix) >> shift, len(matrix)) @ matrix[:kept].T
            for matrix, kept in zip(cosines, corner, strict=True)
        )
        parts.append((left, mask[: corner[0], : corner[1]], right))
    return parts


@functools.lru_cache(maxsize=64)
def _permutation(sizes: tuple[tuple[int, int], ...], order: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order in which a scan visits the tokens and its inverse, (L,) int64."""
    order = token_order(sizes, order, seed)
    return order, np.argsort(order)


def interpretations_table(image_size: int = 224) -> list[dict]:
    """Return one row per size and number of separate stages, 0 for VMamba: parameters and FLOPs of one image.

    Keys: size, separate_stages, parameters, flops, flops_without_scan, flops_scan_once by the counting rule of
    ``globalmamba.model``; flops_transform, the part of them that low-pass and shrinking take as matrix products;
    claim_parameters and claim_flops of the paper. ``merge`` changes none of them. Nothing is computed.
    """
    from globalmamba.model import count_network  # the training stack, needed for counting alone

    rows = []
    for size, (baseline, claim) in CLAIMS.items():
        for stages in range(5):
            with torch.device("meta"):
                network = _interpretation(size, stages)
            row = {"size": size, "separate_stages": stages} | count_network(network, image_size, CHANNELS)
            row["flops_transform"] = _transform_flops(network, image_size, CHANNELS) if stages else 0
            parameters, flops = claim if stages else baseline
            rows.append(row | {"claim_parameters": parameters * 10**6, "claim_flops": round(flops * 10**9)})
    return rows


def _interpretation(size: str, separate_stages: int) -> VMamba:
    if separate_stages == 0:
        return VMamba(num_classes=1000, **SIZES[size])
    choices = {"bands": "nested", "order": "low-high", "content": "frequency"}
    return GlobalVMamba(num_classes=1000, separate_stages=separate_stages, **choices, **SIZES[size])


def _transform_flops(network: GlobalVMamba, image_size: int, channels: int) -> int:
    with FlopCounterMode(display=False) as counter:
        network.level_images(torch.empty(1, channels, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2  # the counter gives 2 for a multiply-add
