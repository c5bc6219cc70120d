"""Pictures of the uncertainty: its distributions, and the images of which the network is most and least sure."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from shared.data.images import ImageSet

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

SHOWN = 10  # images in a line


def draw_histograms(path: Path, clean: Tensor, changed: dict[str, Tensor]) -> None:
    """Draw how the uncertainty is distributed over clean images and over each kind of changed ones."""
    series = {"clean": clean, **changed}
    low = min(float(values.min()) for values in series.values())
    high = max(float(values.max()) for values in series.values())
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for name, values in series.items():
        axes.hist(values.numpy(), bins=60, range=(low, high), histtype="step", density=True, label=name)
    axes.set_xlabel("uncertainty ||u||")
    axes.set_ylabel("density")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_extremes(path: Path, images: ImageSet, uncertainty: Tensor) -> None:
    """Draw the ten images of the greatest uncertainty above the ten of the least."""
    order = uncertainty.argsort(stable=True).tolist()
    count = min(SHOWN, len(order))
    lines = {"most uncertain": order[::-1][:count], "least": order[:count]}
    figure, axes = plt.subplots(2, count, figsize=(1.2 * count, 3), squeeze=False)
    for line, (title, indices) in zip(axes, lines.items(), strict=True):
        for place, index in zip(line, indices, strict=True):
            place.imshow(images.image(index).permute(1, 2, 0).numpy())
            place.set_title(f"{float(uncertainty[index]):.2f}", fontsize=7)
            place.axis("off")
        line[0].text(-0.1, 0.5, title, rotation=90, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_uncertainty(folder: Path, images: ImageSet, clean: Tensor, changed: dict[str, Tensor]) -> None:
    """Draw both pictures into ``folder``: uncertainty.png, extremes.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        draw_histograms(folder / "uncertainty.png", clean, changed)
        draw_extremes(folder / "extremes.png", images, clean)
