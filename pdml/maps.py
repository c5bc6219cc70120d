"""Pictures of a run: classification, uncertainty, confusion, split and training curves, as PNG files.

Drawn with matplotlib's objects on the Agg canvas, without pyplot and its global state.
"""

import csv
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pdml.inference import Readout, ScenePrediction
from pdml.scenes import Scene
from pdml.splits import Split

BACKGROUND = "#d9d9d9"  # pixels without a class
DOTS_PER_INCH = 150


def draw_maps(folder: Path, scene: Scene, split: Split, prediction: ScenePrediction) -> None:
    """Draw classification, uncertainty, confusion and split .png of a run into its folder.

    The read-out is the fused one where there is one. Curves are drawn where the folder holds their log.
    """
    folder, readout = Path(folder), prediction.fused or prediction.centre
    figures = {
        "classification": _draw_classification(scene, readout),
        "confusion": _draw_confusion(scene, split, readout),
        "split": _draw_split(scene, split),
    }
    if np.isfinite(readout.uncertainty).any():
        figures["uncertainty"] = _draw_uncertainty(scene, readout)
    for name, figure in figures.items():
        _save(figure, folder / f"{name}.png")
    logs = folder.glob("curves/version_*/metrics.csv")
    logs = sorted(logs, key=lambda log: int(log.parent.name.removeprefix("version_")))
    if logs:
        draw_curves(folder, logs)


def draw_curves(folder: Path, logs: list[Path]) -> None:
    """Draw every column of Lightning's ``metrics.csv`` against its step into curves.png.

    One log per start of the run, in their order; a step that was run twice is drawn as it went the last time.
    """
    by_step: dict[float, dict] = {}
    for log in logs:
        with open(log, newline="") as file:
            by_step |= {float(line["step"]): line for line in csv.DictReader(file)}
    lines = [by_step[step] for step in sorted(by_step)]
    names = [name for name in (lines[0] if lines else {}) if name not in ("step", "epoch")]
    figure = Figure(figsize=(6, 2.2 * max(len(names), 1)), layout="constrained")
    panels = figure.subplots(max(len(names), 1), sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=False):
        points = [(float(line["step"]), float(line[name])) for line in lines if line[name]]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_ylabel(name)
    panels[-1].set_xlabel("step")
    _save(figure, Path(folder) / "curves.png")


def class_picture(labels: np.ndarray, colours: list[str]) -> np.ndarray:
    """Return (H, W, 3) float of a label map (H, W), 0 = background, classes 1..C in their colours."""
    return np.array([to_rgb(colour) for colour in (BACKGROUND, *colours)])[labels]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _image_figure(scene: Scene, panels: int):
    """Return a figure with room for ``panels`` pictures of the scene side by side, and its axes."""
    height, width = scene.labels.shape
    inches = 4.5 if height <= width else max(4.5 * width / height, 2.2)
    tall = min(max(inches * height / width, 2.5), 9)
    figure = Figure(figsize=(inches * panels + 2, tall + 0.6), layout="constrained")
    figure.suptitle(scene.name)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _legend(figure: Figure, names: list[str], colours: list[str]) -> None:
    handles = [Patch(facecolor=c, edgecolor="black", label=n) for n, c in zip(names, colours, strict=True)]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)


def _draw_classification(scene: Scene, readout: Readout) -> Figure:
    figure, (truth, decided) = _image_figure(scene, 2)
    truth.imshow(class_picture(scene.labels, scene.colours), interpolation="nearest")
    truth.set_title("labels", fontsize=9)
    decided.imshow(class_picture(readout.prediction + 1, scene.colours), interpolation="nearest")
    decided.set_title("classification", fontsize=9)
    _legend(figure, ["none", *scene.class_names], [BACKGROUND, *scene.colours])
    return figure


def _draw_uncertainty(scene: Scene, readout: Readout) -> Figure:
    figure, (axis,) = _image_figure(scene, 1)
    # A few outliers would leave the rest of the map in one colour; the arrows on the bar say that they exist.
    low, high = np.nanpercentile(readout.uncertainty, [1, 99])
    shades = colormaps["viridis"].with_extremes(bad=BACKGROUND)
    image = axis.imshow(readout.uncertainty, cmap=shades, vmin=low, vmax=high, interpolation="nearest")
    axis.set_title("uncertainty", fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.8, extend="both")
    return figure


def _draw_confusion(scene: Scene, split: Split, readout: Readout) -> Figure:
    scored = split.scored(scene.labels) & (readout.prediction >= 0)
    count = len(scene.class_names)
    matrix = np.zeros((count, count), np.int64)
    np.add.at(matrix, (scene.labels[scored] - 1, readout.prediction[scored]), 1)
    fraction = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 2.5 + 0.42 * count
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    for (row, column), number in np.ndenumerate(matrix):
        if number:
            colour = "white" if fraction[row, column] > 0.5 else "black"
            axis.text(column, row, number, ha="center", va="center", fontsize=6, color=colour)
    names = [n if kept else f"({n})" for n, kept in zip(scene.class_names, split.classes, strict=True)]
    axis.set_xticks(range(count), names, rotation=90, fontsize=7)
    axis.set_yticks(range(count), names, fontsize=7)
    axis.set_xlabel("decided")
    axis.set_ylabel("label; in brackets: left out of the scores" if not split.classes.all() else "label")
    axis.set_title(f"{scene.name}: {matrix.sum()} scored pixels", fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.8, label="fraction of the label's pixels")
    return figure


def _draw_split(scene: Scene, split: Split) -> Figure:
    figure, (axis,) = _image_figure(scene, 1)
    sides = {"no part": BACKGROUND, "trained on": "#d62728", "scored": "#1f77b4"}
    if split.blocks is not None:
        sides |= {"training block": "#f4cccc", "test block": "#cfe2f3"}
    colour = {name: to_rgb(value) for name, value in sides.items()}
    picture = np.tile(np.array(colour["no part"]), (*scene.labels.shape, 1))
    if split.blocks is not None:
        del sides["no part"]
        for side, name in enumerate(["training block", "test block"]):
            picture[split.blocks == side] = colour[name]
    picture[split.test], picture[split.train] = colour["scored"], colour["trained on"]
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(f"{split.train.sum()} pixels trained on, {split.test.sum()} scored", fontsize=9)
    _legend(figure, list(sides), list(sides.values()))
    return figure
