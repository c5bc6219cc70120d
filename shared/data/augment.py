"""Augmentation as a function of a key: (seed, epoch, index, view) names every draw, so workers do not matter.

The recipe of DeiT (arXiv 2012.12877) as Vim, VMamba and their followers use it, in timm's order: crop, flip,
RandAugment (arXiv 1909.13719), colour jitter, normalisation, random erasing (arXiv 1708.04896); for a whole batch
mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899). RandAugment is timm's own, the rest follows timm's rules
(https://github.com/huggingface/pytorch-image-models) on numbers drawn here.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as transforms
from omegaconf import MISSING
from PIL import Image, ImageOps
from scipy.special import betaincinv
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode

from shared.data.keyed import keyed_bits, keyed_uniform, stream
from shared.errors import UserError

CROP, FLIP, RAND_AUGMENT, JITTER, ERASE, NOISE, MIX = (
    stream(f"augment.{name}") for name in ("crop", "flip", "rand_augment", "jitter", "erase", "noise", "mix")
)
ATTEMPTS = 10  # timm's and torchvision's, at a rectangle that fits
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's
PILLOW = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
Key = tuple[int, int, np.ndarray, np.ndarray]  # seed, epoch, index (b,), view (b,)


@dataclass
class AugmentationConfig:
    """Types only: every value stands in YAML."""

    image_size: int = MISSING
    crop: str = MISSING  # random-resized (scale, ratio) | pad (padding)
    scale: list[float] | None = MISSING  # smallest and largest part of the image's area
    ratio: list[float] | None = MISSING  # smallest and largest width / height
    padding: int | None = MISSING  # black pixels on every side
    flip: float = MISSING  # probability
    # Of brightness, contrast, saturation; 0 = off. timm leaves it out beside RandAugment.
    color_jitter: float = MISSING
    rand_augment: str | None = MISSING  # as timm writes it: rand-m9-mstd0.5-inc1
    random_erasing: float = MISSING  # probability
    interpolation: str = MISSING  # bicubic | bilinear
    mean: list[float] = MISSING
    std: list[float] = MISSING
    eval_crop_ratio: float = MISSING  # test: short side to image_size / ratio, then the middle


def _check(cfg: AugmentationConfig) -> None:
    """Raise UserError for the first value that cannot be used."""
    pads = cfg.crop == "pad"
    fits = [
        ("image_size", cfg.image_size >= 1, "1 or more pixels"),
        ("crop", cfg.crop in ("random-resized", "pad"), "random-resized or pad"),
        ("interpolation", cfg.interpolation in PILLOW, "bicubic or bilinear"),
        ("flip", 0 <= cfg.flip <= 1, "a probability"),
        ("random_erasing", 0 <= cfg.random_erasing <= 1, "a probability"),
        ("color_jitter", 0 <= cfg.color_jitter <= 1, "0 to 1"),
        ("mean", len(cfg.mean) == 3, "three numbers"),
        ("std", len(cfg.std) == 3 and min(cfg.std) > 0, "three positive numbers"),
        ("eval_crop_ratio", 0 < cfg.eval_crop_ratio <= 1, "more than 0, at most 1"),
        ("padding", not pads or (cfg.padding is not None and cfg.padding >= 0), "0 or more pixels"),
        ("scale", pads or _rising(cfg.scale, 1), "two parts of the area, as [0.08, 1.0]"),
        ("ratio", pads or _rising(cfg.ratio), "two ratios of width to height, as [0.75, 1.3333]"),
    ]
    for field, is_right, remedy in fits:
        if not is_right:
            raise UserError(f"augment.{field} = {getattr(cfg, field)} cannot be used: set {remedy}")


def _rising(pair, largest: float = math.inf) -> bool:
    return pair is not None and len(pair) == 2 and 0 < pair[0] <= pair[1] <= largest


class Augmentation:
    """Turns uint8 images into a normalised batch, float32 (b, 3, S, S), for training and for testing.

    Images are a tensor (b, 3, H, W) or a list of (3, H, W). With crop "pad" they must be square and of one size, and
    are resized to ``image_size`` first where they have another. Raises UserError for values that cannot be used.
    """

    def __init__(self, cfg: AugmentationConfig):
        _check(cfg)
        self.cfg, self.size = cfg, cfg.image_size
        self.interpolation = InterpolationMode(cfg.interpolation)
        self.shift = torch.tensor(list(cfg.mean)).view(3, 1, 1) * 255
        self.factor = 1 / (torch.tensor(list(cfg.std)).view(3, 1, 1) * 255)
        self.rand_augment = _rand_augment(cfg) if cfg.rand_augment else None

    def train(self, images: Tensor | list[Tensor], key: Key) -> Tensor:
        """Return the augmented batch; ``key`` is (seed, epoch, index (b,), view (b,))."""
        if len(images) == 0:
            return torch.empty(0, 3, self.size, self.size)
        batch = (self._padded_crop if self.cfg.crop == "pad" else self._resized_crop)(images, key)
        flipped = torch.from_numpy(np.flatnonzero(keyed_uniform(FLIP, *key) < self.cfg.flip))
        batch[flipped] = batch[flipped].flip(-1)
        if self.rand_augment is not None:
            self._rand_augment(batch, key)
        if self.cfg.color_jitter:
            self._jitter(batch, key)
        batch = self._normalised(batch)
        if self.cfg.random_erasing:
            self._erase(batch, key)
        return batch

    def evaluate(self, images: Tensor | list[Tensor]) -> Tensor:
        """Return the batch of a test: short side to image_size / eval_crop_ratio, the middle cut out."""
        if len(images) == 0:
            return torch.empty(0, 3, self.size, self.size)
        short = math.floor(self.size / self.cfg.eval_crop_ratio)

        def middle(images: Tensor) -> Tensor:
            resized = transforms.resize(images, [short], self.interpolation, antialias=True)
            return transforms.center_crop(resized, [self.size, self.size])

        batch = torch.stack([middle(i) for i in images]) if isinstance(images, list) else middle(images)
        return self._normalised(batch)

    def _normalised(self, batch: Tensor) -> Tensor:
        return batch.to(torch.float32).sub_(self.shift).mul_(self.factor)

    def _square(self, images: Tensor | list[Tensor]) -> Tensor:
        shapes = {tuple(image.shape[-2:]) for image in images}
        height, width = next(iter(shapes))
        if len(shapes) > 1 or height != width:
            wrong = f"needs square images of one size, but there is one of {width} x {height} pixels"
            raise UserError(f"augment.crop = pad {wrong}: set augment.crop to random-resized")
        batch = torch.stack(images) if isinstance(images, list) else images
        if height == self.size:
            return batch
        return transforms.resize(batch, [self.size, self.size], self.interpolation, antialias=True)

    def _padded_crop(self, images: Tensor | list[Tensor], key: Key) -> Tensor:
        """Cut a window at random out of every image with its black border; the whole batch at once."""
        batch, padding, size = self._square(images), self.cfg.padding, self.size
        offsets = (keyed_uniform(CROP, *_columns(key), np.arange(2)) * (2 * padding + 1)).astype(np.int64)
        padded = transforms.pad(batch, [padding]).numpy()
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))  # (b, 3, Y, X, S, S)
        return torch.from_numpy(windows[np.arange(len(batch)), :, offsets[:, 0], offsets[:, 1]])

    def _resized_crop(self, images: Tensor | list[Tensor], key: Key) -> Tensor:
        """Cut a rectangle of random area and shape out of every image and resize it."""
        draws = keyed_uniform(CROP, *_columns(_columns(key)), np.arange(ATTEMPTS)[:, None], np.arange(4))
        heights, widths = ([image.shape[axis] for image in images] for axis in (-2, -1))
        boxes = crop_boxes(heights, widths, self.cfg.scale, self.cfg.ratio, draws).tolist()
        size = [self.size, self.size]
        parts = [
            transforms.resized_crop(image, *box, size, self.interpolation, antialias=True)
            for image, box in zip(images, boxes, strict=True)
        ]
        return torch.stack(parts)

    def _rand_augment(self, batch: Tensor, key: Key) -> None:
        """Apply timm's RandAugment to every image; the global generators that it draws from are put back afterwards."""
        seeds = keyed_bits(RAND_AUGMENT, *key).tolist()
        states = random.getstate(), np.random.get_state()
        try:
            for image, seed in zip(batch, seeds, strict=True):
                random.seed(seed)
                np.random.seed(seed >> 32)
                picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
                image.copy_(torch.from_numpy(np.array(self.rand_augment(picture))).permute(2, 0, 1))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _jitter(self, batch: Tensor, key: Key) -> None:
        """Change brightness, contrast and saturation of every image, in an order of its own."""
        adjust = (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation)
        draws = keyed_uniform(JITTER, *_columns(key), np.arange(6))
        factors = 1 + self.cfg.color_jitter * (2 * draws[:, :3] - 1)
        for image, factor, order in zip(batch, factors, draws[:, 3:].argsort(1), strict=True):
            for step in order:
                image.copy_(adjust[step](image, float(factor[step])))

    def _erase(self, batch: Tensor, key: Key) -> None:
        """Fill a rectangle of some images, already normalised, with normal noise, pixel by pixel."""
        chosen = np.flatnonzero(keyed_uniform(ERASE, *key) < self.cfg.random_erasing)
        some = (*key[:2], key[2][chosen], key[3][chosen])
        draws = keyed_uniform(ERASE, *_columns(_columns(some)), np.arange(ATTEMPTS)[:, None], np.arange(4))
        boxes, seeds = erased_boxes(self.size, draws).tolist(), keyed_bits(NOISE, *some).tolist()
        generator = torch.Generator()
        for image, (top, left, height, width), seed in zip(chosen, boxes, seeds, strict=True):
            noise = torch.randn(3, height, width, generator=generator.manual_seed(seed))
            batch[image, :, top : top + height, left : left + width] = noise


def _rand_augment(cfg: AugmentationConfig) -> RandAugment:
    hints = {  # as timm.data.create_transform gives them
        "translate_const": int(cfg.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in cfg.mean),
        "interpolation": PILLOW[cfg.interpolation],
    }
    try:
        rand_augment = rand_augment_transform(cfg.rand_augment, hints)
    except (AssertionError, KeyError, ValueError) as error:
        wrong = f"augment.rand_augment = {cfg.rand_augment!r} is not understood by timm"
        raise UserError(f"{wrong}: write it as in rand-m9-mstd0.5-inc1") from error
    for operation in rand_augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return rand_augment


def _posterize(picture: Image.Image, bits: int, **unused) -> Image.Image:
    """Keep the upper bits of every colour; none is black, as recipes were trained with, where Pillow 13 raises."""
    if bits >= 8:
        return picture
    return ImageOps.posterize(picture, bits) if bits > 0 else Image.new("RGB", picture.size)


def _columns(key: Key) -> Key:
    """Return the key with a further axis, for several draws per image."""
    return (*key[:2], key[2][..., None], key[3][..., None])


def crop_boxes(heights, widths, scale, ratio, draws: np.ndarray) -> np.ndarray:
    """Return (top, left, height, width) of a random part of every image, (b, 4) int64, as torchvision draws them.

    ``heights``, ``widths``: (b,) of the images; area and shape of a part lie in the ranges ``scale`` and ``ratio``.
    ``draws``: (b, attempts, 4) uniform numbers. Where no attempt fits, the largest middle part of an allowed shape.
    """
    heights, widths = (np.asarray(lengths, np.int64)[:, None] for lengths in (heights, widths))
    wide, high = _sides(heights * widths, scale, ratio, draws)
    fits = (wide > 0) & (wide <= widths) & (high > 0) & (high <= heights)
    shapes = np.clip(widths / heights, *ratio)
    middle_wide = np.maximum(np.minimum(widths, np.rint(heights * shapes).astype(np.int64)), 1)
    middle_high = np.maximum(np.minimum(heights, np.rint(widths / shapes).astype(np.int64)), 1)
    places = (heights - middle_high) // 2, (widths - middle_wide) // 2
    middle = np.concatenate([*places, middle_high, middle_wide], 1)
    return _first_fit(heights, widths, high, wide, fits, draws, middle)


def erased_boxes(size: int, draws: np.ndarray) -> np.ndarray:
    """Return the parts to erase of square images as ``crop_boxes`` does, without a pixel where no attempt fits."""
    high, wide = _sides(size * size, ERASED_AREA, ERASED_RATIO, draws)
    fits = (high > 0) & (high < size) & (wide > 0) & (wide < size)
    return _first_fit(size, size, high, wide, fits, draws, np.zeros(4, np.int64))


def _sides(pixels, area, ratio, draws: np.ndarray) -> list[np.ndarray]:
    """Return both sides, (b, attempts) int64, of rectangles whose part of the ``pixels`` and ratio are drawn."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # numpy's exponential differs in the last digit from one processor to another.
    ratios = np.vectorize(math.exp, [float])(low + (high - low) * draws[..., 1])
    pixels = pixels * (area[0] + (area[1] - area[0]) * draws[..., 0])
    return [np.rint(np.sqrt(square)).astype(np.int64) for square in (pixels * ratios, pixels / ratios)]


def _first_fit(heights, widths, high, wide, fits, draws: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Return the first attempt that fits, put at a drawn place, (b, 4) int64."""
    top, left = draws[..., 2] * (heights - high + 1), draws[..., 3] * (widths - wide + 1)
    drawn = np.stack([top.astype(np.int64), left.astype(np.int64), high, wide], -1)
    drawn = drawn[np.arange(len(fits)), fits.argmax(1)]
    return np.where(fits.any(1)[:, None], drawn, otherwise)


def mix(
    images: Tensor,
    labels: Tensor,
    key: tuple[int, ...],
    mixup_alpha: float,
    cutmix_alpha: float,
    switch_probability: float,
    smoothing: float,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Return mixed images (b, 3, H, W) and soft labels (b, classes) float32, as timm's Mixup does by batch.

    One draw, named by ``key`` such as (seed, step), holds for the batch: mixup or CutMix (``switch_probability`` of
    the latter where both have an alpha above 0) and its share. timm pairs the batch with its reverse; here it is
    rolled by half, so that pairs stay together when every rank takes every r-th element of a global batch (of a
    multiple of twice the ranks). Both alphas 0: only the labels are smoothed.
    """
    switch, share, down, right = keyed_uniform(MIX, *key, np.arange(4)).tolist()
    cut = cutmix_alpha > 0 and (mixup_alpha <= 0 or switch < switch_probability)
    soft = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    soft.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    if len(images) < 2 or (mixup_alpha <= 0 and cutmix_alpha <= 0):
        return images, soft
    alpha = cutmix_alpha if cut else mixup_alpha
    kept = float(betaincinv(alpha, alpha, share))  # of Beta(alpha, alpha)
    partners = images.roll(len(images) // 2, 0)
    if cut:  # a rectangle about any centre, cut off at the borders
        spans, part = [], math.sqrt(1 - kept)
        for length, place in zip(images.shape[-2:], (down, right), strict=True):
            centre, side = int(place * length), int(length * part)
            spans.append((max(centre - side // 2, 0), min(centre + (side + 1) // 2, length)))
        (top, bottom), (left, right) = spans
        images = images.clone()
        images[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / images[0, 0].numel()
    else:
        images = torch.lerp(partners, images, kept)
    return images, torch.lerp(soft.roll(len(soft) // 2, 0), soft, kept)
