"""What a detector or a segmenter answers, beside what is there: a few test images as one picture."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

SHOWN = 4  # images
SURE = 0.3  # score from which on a box is drawn
VOID = 255


def draw_predictions(path: Path, images, answers: Iterable) -> None:
    """Write ``path``, a row for each of the first images: the image, what is annotated, what is answered.

    ``answers``: mmdet's or mmseg's data elements in the order of ``images``.
    """
    shown = list(islice(answers, SHOWN))
    figure, axes = plt.subplots(len(shown), 3, figsize=(9, 2.4 * len(shown)), squeeze=False)
    colours = np.array([*images.metainfo["palette"]], np.uint8)
    for line, answer in zip(axes, shown, strict=True):
        image = np.asarray(Image.open(answer.img_path).convert("RGB"))
        for place, axis in enumerate(line):
            axis.set_axis_off()
            axis.imshow(image)
            if "pred_sem_seg" in answer and place:
                labels = (answer.gt_sem_seg if place == 1 else answer.pred_sem_seg).data[0].numpy()
                axis.imshow(np.where((labels == VOID)[..., None], 0, colours[labels % len(colours)]), alpha=0.8)
            elif place:
                things = answer.gt_instances if place == 1 else answer.pred_instances
                _draw_boxes(axis, things, colours, answer.scale_factor if place == 1 else (1.0, 1.0))
    for axis, title in zip(axes[0], ("image", "annotated", "predicted"), strict=True):
        axis.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _draw_boxes(axis, things, colours: np.ndarray, scale: tuple[float, float]) -> None:
    scores = things.get("scores", np.ones(len(things)))
    for box, label, score in zip(np.asarray(things.bboxes), np.asarray(things.labels), scores, strict=True):
        if score >= SURE:
            left, top, right, bottom = box / np.array([*scale, *scale])
            colour = colours[label] / 255
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1.5))
