"""The two views of an image that its instance objective compares: BYOL's augmentations, as MoCo-v3 trains with them.

    crop      a rectangle of random area and shape, resized; a flip
    colours   brightness, contrast, saturation and hue, in an order of each image's own; grey
    blur      Gaussian; of the second view solarize as well

The operations are those of torchvision.transforms.v2, each image with numbers of its own, on a whole batch and on any
device at once: every one of them is compared with torchvision's in ``tests/test_views.py``. What is drawn is a function
of (seed, epoch, image, view), so neither workers, ranks, a resumption nor the device change it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import MISSING
from torch import Tensor

from shared.data.augment import ATTEMPTS, crop_boxes
from shared.data.keyed import keyed_uniform, stream
from shared.errors import UserError

CROP, FLIP, COLOUR, JITTER, ORDER, GREY, BLUR, SOLARIZE = (
    stream(f"opera.{name}") for name in ("crop", "flip", "colour", "jitter", "order", "grey", "blur", "solarize")
)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's
Key = tuple[int, int, np.ndarray]  # seed, epoch, index (b,)


@dataclass
class ViewsConfig:
    """Types only: every value is in YAML. Pairs are of the first and of the second view."""

    image_size: int = MISSING
    scale: list[float] = MISSING  # smallest and largest part of the image's area
    ratio: list[float] = MISSING  # smallest and largest width / height
    flip: float = MISSING  # probability
    jitter: list[float] = MISSING  # strength of brightness, contrast, saturation, hue
    jitter_probability: float = MISSING
    grey: float = MISSING  # probability
    blur: list[float] = MISSING  # probabilities
    blur_sigma: list[float] = MISSING  # smallest and largest standard deviation in pixels
    solarize: list[float] = MISSING  # probabilities
    mean: list[float] = MISSING
    std: list[float] = MISSING


def _check(cfg: ViewsConfig) -> None:
    """Raise UserError for the first value that cannot be used."""
    rising = lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1]  # noqa: E731
    chances = lambda values: all(0 <= value <= 1 for value in values)  # noqa: E731
    fits = [
        ("image_size", cfg.image_size >= 1, "1 or more pixels"),
        ("scale", rising(cfg.scale) and cfg.scale[1] <= 1, "two parts of the area, as [0.2, 1.0]"),
        ("ratio", rising(cfg.ratio), "two ratios of width to height, as [0.75, 1.3333]"),
        ("flip", chances([cfg.flip]), "a probability"),
        ("jitter", len(cfg.jitter) == 4 and chances(cfg.jitter) and cfg.jitter[3] <= 0.5, "[0.4, 0.4, 0.2, 0.1]"),
        ("jitter_probability", chances([cfg.jitter_probability]), "a probability"),
        ("grey", chances([cfg.grey]), "a probability"),
        ("blur", len(cfg.blur) == 2 and chances(cfg.blur), "two probabilities"),
        ("blur_sigma", rising(cfg.blur_sigma), "two standard deviations, as [0.1, 2.0]"),
        ("solarize", len(cfg.solarize) == 2 and chances(cfg.solarize), "two probabilities"),
        ("mean", len(cfg.mean) == 3, "three numbers"),
        ("std", len(cfg.std) == 3 and min(cfg.std) > 0, "three positive numbers"),
    ]
    for field, is_right, remedy in fits:
        if not is_right:
            raise UserError(f"views.{field} = {getattr(cfg, field)} cannot be used: set {remedy}")


class Views:
    """Images uint8 (b, 3, H, W), on any device -> a normalised view float32 (b, 3, S, S) there.

    Raises UserError for values that cannot be used.
    """

    def __init__(self, cfg: ViewsConfig):
        _check(cfg)
        self.cfg = cfg

    def __call__(self, images: Tensor, key: Key, view: int) -> Tensor:
        """Return view 0 or 1; ``key`` is (seed, epoch, index (b,))."""
        key = (*key, view)
        return self.finished(self.cropped(images, key), key)

    def cropped(self, images: Tensor, key) -> Tensor:
        """Return the crops of images of one size, float32 (b, 3, S, S) in [0, 1]."""
        count, _, height, width = images.shape
        return crop(images, self.boxes([height] * count, [width] * count, key), self.cfg.image_size)

    def boxes(self, heights, widths, key) -> np.ndarray:
        """Return (top, left, height, width) of the crop of every image, (b, 4); heights and widths are theirs, (b,)."""
        wide = (*key[:2], key[2][:, None, None], key[3])
        draws = keyed_uniform(CROP, *wide, np.arange(ATTEMPTS)[:, None], np.arange(4))
        return crop_boxes(heights, widths, self.cfg.scale, self.cfg.ratio, draws)

    def finished(self, crops: Tensor, key) -> Tensor:
        """Return crops in [0, 1] with all that follows the crop, normalised."""
        cfg, view = self.cfg, key[3]
        flipped = self._chosen(FLIP, cfg.flip, key, crops.device)
        crops = torch.where(flipped, crops.flip(-1), crops)
        crops = self._jittered(crops, key)
        crops = torch.where(self._chosen(GREY, cfg.grey, key, crops.device), grey(crops), crops)
        if cfg.blur[view]:
            draws = keyed_uniform(BLUR, *key, 1)
            sigma = cfg.blur_sigma[0] + (cfg.blur_sigma[1] - cfg.blur_sigma[0]) * draws
            chosen = self._chosen(BLUR, cfg.blur[view], (*key, 0), crops.device)
            crops = torch.where(chosen, blurred(crops, sigma, cfg.blur_sigma[1]), crops)
        if cfg.solarize[view]:
            chosen = self._chosen(SOLARIZE, cfg.solarize[view], key, crops.device)
            crops = torch.where(chosen & (crops >= 0.5), 1 - crops, crops)
        mean, std = (crops.new_tensor(list(values)).view(3, 1, 1) for values in (cfg.mean, cfg.std))
        return (crops - mean) / std

    def _chosen(self, what: int, probability: float, key, device) -> Tensor:
        """Return which images are changed, (b, 1, 1, 1) bool."""
        return _numbers(keyed_uniform(what, *key) < probability, device)

    def _jittered(self, crops: Tensor, key) -> Tensor:
        """Change the colours of some images, each in an order of its own."""
        strength = np.asarray(self.cfg.jitter)
        if not strength.any():
            return crops
        wide = (*key[:2], key[2][:, None], key[3])
        factors = strength * (2 * keyed_uniform(JITTER, *wide, np.arange(4)) - 1) + np.array([1, 1, 1, 0])
        order = keyed_uniform(ORDER, *wide, np.arange(4)).argsort(1)
        chosen = keyed_uniform(COLOUR, *key) < self.cfg.jitter_probability
        for place in range(4):
            for number, change in enumerate((brightness, contrast, saturation, hue)):
                now = np.flatnonzero(chosen & (order[:, place] == number))
                if strength[number] and len(now):
                    rows = torch.from_numpy(now).to(crops.device)
                    changed = change(crops[rows], _numbers(factors[now, number], crops.device))
                    crops = crops.index_copy(0, rows, changed)
        return crops


def _numbers(values: np.ndarray, device) -> Tensor:
    """Return one number for each image, (b, 1, 1, 1), on a device."""
    values = values.astype(np.float32) if values.dtype.kind == "f" else values
    return torch.from_numpy(values).to(device).view(-1, 1, 1, 1)


def crop(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Return parts of uint8 images (b, 3, H, W), resized bilinearly with antialiasing: float32 (b, 3, S, S) in [0, 1].

    ``boxes``: (b, 4), top, left, height, width. A resize along one axis is a product with a matrix of weights.
    """
    top, left, high, wide = (torch.from_numpy(boxes[:, i].astype(np.float32)).to(images.device) for i in range(4))
    rows = resize_weights(top, high, images.shape[2], size)
    columns = resize_weights(left, wide, images.shape[3], size)
    return rows[:, None] @ (images.to(torch.float32) / 255) @ columns[:, None].mT


def resize_weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Return the weights (b, size, source) that resize a part of a line to ``size`` pixels, as torchvision's do.

    A pixel is the mean of those about its place, by a triangle as wide as the shrinking asks for; start, length: (b,).
    """
    scale = (length / size)[:, None, None]  # source pixels for one
    reach = scale.clamp_min(1)
    # In float32 whatever torch's default is, (b, size, 1), from the part's start.
    centre = (torch.arange(size, device=start.device, dtype=start.dtype)[:, None] + 0.5) * scale
    place = torch.arange(source, device=start.device) - start[:, None, None]  # (b, 1, source)
    inside = (place >= 0) & (place < length[:, None, None])
    weights = (1 - ((place + 0.5 - centre) / reach).abs()).clamp_min(0) * inside
    return weights / weights.sum(2, keepdim=True)


def grey(images: Tensor) -> Tensor:
    """Return images (b, 3, S, S) in grey."""
    return luminance(images).expand_as(images)


def luminance(images: Tensor) -> Tensor:
    """Return the grey value (b, 1, S, S)."""
    weights = images.new_tensor(GREY_WEIGHTS).view(3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = luminance(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luminance(images), images, factor).clamp(0, 1)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by ``turn`` of a full circle.

    With v the largest and c the spread of a pixel's colours, a colour channel is v - c f, f a trapezoid of the hue.
    """
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = value - low
    red, green, blue = images.split(1, 1)
    safe = spread.where(spread > 0, 1.0)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = torch.remainder(sector + 6 * turn, 6)
    offset = images.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    place = torch.remainder(sector + offset, 6)  # (b, 3, S, S)
    return value - spread * torch.minimum(place, 4 - place).clamp(0, 1)


def blurred(images: Tensor, sigma: np.ndarray, largest: float) -> Tensor:
    """Return images blurred by a Gaussian of sigma (b,) pixels, cut off at 3 ``largest`` ones, the border mirrored."""
    size = images.shape[-1]
    sigma = torch.from_numpy(sigma.astype(np.float32)).to(images.device)
    weights = blur_weights(sigma, size, min(size - 1, math.ceil(3 * largest)))[:, None]
    return weights @ images @ weights.mT


def blur_weights(sigma: Tensor, size: int, reach: int) -> Tensor:
    """Return the weights (b, size, size) of a blur along one axis, for sigma (b,), cut off at ``reach`` pixels."""
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]).square())  # (b, taps)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + offsets  # (size, taps)
    source = source.abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    weights = sigma.new_zeros(len(sigma), size, size)
    return weights.scatter_add_(2, source.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1).contiguous())
