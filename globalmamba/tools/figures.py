"""A picture of the serialization for any image file: its frequency levels, shrunk levels and tokens.

    python -m globalmamba.tools.figures photo.jpg levels.png [--size 224 --patch 16 --levels 4]

One column per level, low to high frequency; rows: the low-passed image x^k, the shrunk image x'_k that is cut
into patches, and the grid of tokens coloured by their place in the sequence. Drawn with matplotlib's objects
on the Agg canvas, without pyplot and its global state.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor

from globalmamba.serialization import CHOICES, FrequencySerialization, token_order
from shared.errors import UserError

DOTS_PER_INCH = 150


def load_image(path: Path, size: int) -> Tensor:
    """Return an image file as (1, 3, size, size) float32 in [0, 1]: shorter side to ``size``, centre cut out.

    Raises UserError for a file that is missing or no image.
    """
    try:
        with Image.open(path) as file:
            square = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as an image ({error}): give a whole JPEG or PNG file") from error
    return torch.from_numpy(np.asarray(square, np.float32) / 255).permute(2, 0, 1)[None]


def token_places(serialization: FrequencySerialization) -> list[np.ndarray]:
    """Return for every level the places of its tokens in the sequence, counted from 1: K arrays (h_k, w_k)."""
    places = np.argsort(token_order(serialization.grids, serialization.order, serialization.order_seed)) + 1
    ends = np.cumsum([rows * columns for rows, columns in serialization.grids])
    return [p.reshape(g) for p, g in zip(np.split(places, ends[:-1]), serialization.grids, strict=True)]


def draw_levels(path: Path, image: Tensor, serialization: FrequencySerialization) -> None:
    """Draw levels, shrunk levels and tokens of an image (1, 3, H, W) in [0, 1] into a PNG file."""
    with torch.no_grad():
        full, shrunk = serialization.level_images(image), serialization.shrunk_images(image)
    places = token_places(serialization)
    figure = Figure(figsize=(2.6 * serialization.levels + 0.8, 8), layout="constrained")
    axes = figure.subplots(3, serialization.levels)
    for level, (low_passed, small, tokens) in enumerate(zip(full, shrunk, places, strict=True)):
        # What a disjoint level adds has mean 0: shown around grey.
        grey = 0.5 if serialization.bands == "disjoint" and level else 0.0
        for axis, picture, name in ((axes[0, level], low_passed, "x"), (axes[1, level], small, "x'")):
            pixels = (picture[0] + grey).clamp(0, 1).permute(1, 2, 0)
            axis.imshow(pixels.cpu().numpy(), interpolation="nearest")
            axis.set_title("${}^{{{}}}$, {} x {}".format(name, level + 1, *pixels.shape[:2]), fontsize=9)
        colours = axes[2, level].imshow(tokens, vmin=1, vmax=serialization.num_tokens)
        axes[2, level].set_title(
            "{} x {} tokens, {} to {}".format(*tokens.shape, tokens.min(), tokens.max()), fontsize=9
        )
        _draw_grid(axes[1, level], serialization.patch_size, tokens.shape)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(colours, ax=axes[2], label="place in the sequence", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_grid(axis, patch_size: int, grid: tuple[int, int]) -> None:
    """Draw the borders between the patches of a shrunk image."""
    rows, columns = grid
    axis.hlines(np.arange(1, rows) * patch_size - 0.5, -0.5, columns * patch_size - 0.5, "white", linewidth=0.4)
    axis.vlines(np.arange(1, columns) * patch_size - 0.5, -0.5, rows * patch_size - 0.5, "white", linewidth=0.4)


def main() -> None:
    """Draw the levels of one image file."""
    parser = argparse.ArgumentParser(prog="python -m globalmamba.tools.figures", description=__doc__.split("\n")[0])
    parser.add_argument("image", type=Path, help="an image file")
    parser.add_argument("figure", type=Path, help="the PNG file to write")
    for name, default in {"size": 224, "patch": 16, "levels": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, choices in CHOICES.items():
        default = FrequencySerialization.__init__.__kwdefaults__[name]
        parser.add_argument(f"--{name}", choices=choices, default=default)
    args = parser.parse_args()
    choices = {name: getattr(args, name) for name in CHOICES}
    try:
        serialization = FrequencySerialization(
            image_size=args.size, patch_size=args.patch, embed_dim=1, levels=args.levels, **choices
        )
        draw_levels(args.figure, load_image(args.image, args.size), serialization)
    except (UserError, OSError, ValueError) as error:  # of matplotlib, for a folder or a kind of file it cannot write
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
