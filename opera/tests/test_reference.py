"""The reference's views are made of our operations, drawn image by image."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from opera.tools import reference
from opera.views import Views, ViewsConfig

CLOSE = 1e-4  # float32, divided by a deviation of 0.225
# Nothing is left to a draw: the whole image, always flipped, blurred by one pixel; the second view solarized too.
CERTAIN = {
    "image_size": 24,
    "scale": [1.0, 1.0],
    "ratio": [1.0, 1.0],
    "flip": 1.0,
    "jitter": [0.0] * 4,
    "jitter_probability": 1.0,
    "grey": 0.0,
    "blur": [1.0, 1.0],
    "blur_sigma": [1.0, 1.0],
    "solarize": [0.0, 1.0],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def pictures(count: int, side: int = 24) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8)


def largest_difference(cfg: ViewsConfig, images: torch.Tensor) -> float:
    """Return the largest difference of a pixel between both forms of the two views."""
    key, actual = (0, 0, np.arange(len(images))), reference.view_batch(reference.build_views(cfg), images)
    ours = [Views(cfg)(images, key, view) for view in (0, 1)]
    assert all(one.dtype == torch.float32 for one in actual)
    return max(float((one - other).abs().max()) for one, other in zip(actual, ours, strict=True))


@pytest.mark.parametrize("changes", [{}, {"grey": 1.0}, {"flip": 0.0, "blur": [0.0, 1.0]}, {"solarize": [1.0, 0.0]}])
def test_without_chance_both_views_are_ours_pixel_by_pixel(changes):
    assert largest_difference(ViewsConfig(**(CERTAIN | changes)), pictures(3)) < CLOSE


def test_a_resized_image_is_ours_but_for_its_rounding_to_bytes_along_each_axis():
    cfg = ViewsConfig(**(CERTAIN | {"blur": [0.0, 0.0], "solarize": [0.0, 0.0]}))
    assert largest_difference(cfg, pictures(3, 36)) < 1.01 / 255 / min(cfg.std)


def test_colours_are_drawn_from_our_ranges():
    cfg = ViewsConfig(**(CERTAIN | {"jitter": [0.4, 0.4, 0.2, 0.1], "jitter_probability": 0.8}))
    for view in reference.build_views(cfg):
        (applied,) = (part for part in view.transforms if isinstance(part, v2.RandomApply) and part.p == 0.8)
        (jitter,) = applied.transforms
        ranges = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
        for (low, high), wanted in zip(ranges, [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)], strict=True):
            assert (low, high) == pytest.approx(wanted)


def test_every_image_of_a_batch_is_drawn_for_itself():
    cfg = ViewsConfig(**(CERTAIN | {"scale": [0.2, 1.0], "ratio": [0.75, 1.3333]}))
    torch.manual_seed(0)
    first, second = reference.view_batch(reference.build_views(cfg), pictures(1).expand(4, -1, -1, -1))
    rows = torch.cat([first, second]).flatten(1)
    apart = torch.cdist(rows, rows) + 1e9 * torch.eye(8)
    assert rows.shape[0] == 8 and float(apart.min()) > 1
