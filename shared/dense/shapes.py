"""Drawn images for the demo: squares, discs and triangles of one colour each on noise, with boxes, masks and labels."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from shared.data.keyed import keyed_bits, stream
from shared.files import write_text

CLASSES = ("square", "disc", "triangle")
IMAGES = {"train": 64, "test": 16}
ANNOTATIONS = "annotations.json"
SIDE = 64  # of an image; a shape's side is 16 to 28 pixels
DRAWING = stream("dense.shapes")


def draw(split: str, index: int) -> tuple[Image.Image, list[dict[str, Any]], Image.Image]:
    """Return an image (SIDE x SIDE, RGB), its shapes in COCO's terms and the class of every pixel, 0 for none."""
    generator = np.random.default_rng(int(keyed_bits(DRAWING, int(split == "test"), index)))
    image = Image.fromarray(generator.integers(0, 96, (SIDE, SIDE, 3), np.uint8))
    labels, shapes = Image.new("L", (SIDE, SIDE)), []
    for cell in generator.permutation(4)[: generator.integers(1, 4)]:  # no two shapes in one quarter
        kind, side = int(generator.integers(len(CLASSES))), int(generator.integers(16, 29))
        left, top = (
            int(generator.integers(0, SIDE // 2 - side + 1)) + SIDE // 2 * int(half) for half in divmod(cell, 2)
        )
        right, bottom = left + side - 1, top + side - 1
        angles = np.arange(24) * (2 * np.pi / 24)
        around = [(left + (side - 1) * (1 + np.cos(a)) / 2, top + (side - 1) * (1 + np.sin(a)) / 2) for a in angles]
        corners = {
            "square": [(left, top), (right, top), (right, bottom), (left, bottom)],
            "disc": [(float(x), float(y)) for x, y in around],
            "triangle": [((left + right) / 2, top), (right, bottom), (left, bottom)],
        }[CLASSES[kind]]
        colour = tuple(int(value) for value in generator.integers(128, 256, 3))
        ImageDraw.Draw(image).polygon(corners, fill=colour)
        ImageDraw.Draw(labels).polygon(corners, fill=kind + 1)
        polygon = [float(value) for point in corners for value in point]
        box = [left, top, side, side]
        shapes.append({"bbox": box, "area": side * side, "category_id": kind + 1, "segmentation": [polygon]})
    return image, shapes, labels


def _drawn(cache: Path, split: str) -> Path:
    """Return the folder of a split's images, labels and annotations, which is drawn where it is not there.

    It appears whole, whoever else draws it at the same time.
    """
    top = cache / "shapes" / split
    if top.exists():
        return top
    top.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=top.parent))
    content: dict[str, list] = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    for directory in ("images", "labels"):
        (draft / directory).mkdir()
    for index in range(IMAGES[split]):
        image, shapes, labels = draw(split, index)
        name = f"{index:03}.png"
        image.save(draft / "images" / name)
        labels.save(draft / "labels" / name)
        content["images"].append({"id": index, "file_name": name, "width": SIDE, "height": SIDE})
        for shape in shapes:
            shape |= {"id": len(content["annotations"]) + 1, "image_id": index, "iscrowd": 0}
            content["annotations"].append(shape)
    write_text(draft / ANNOTATIONS, json.dumps(content))
    draft.chmod(0o755)
    with contextlib.suppress(OSError):  # another process was first
        draft.rename(top)
    shutil.rmtree(draft, ignore_errors=True)
    return top


def boxes(root: Path, split: str, cache: Path) -> dict[str, Any]:
    """Return where a split with boxes is, in mmdet's terms; drawn into ``cache``."""
    top = _drawn(cache, split)
    return {"ann_file": str(top / ANNOTATIONS), "data_prefix": {"img": str(top / "images")}}


def labels(root: Path, split: str, cache: Path) -> dict[str, Any]:
    """Return where a split with the class of every pixel is, in mmseg's terms; drawn into ``cache``."""
    top = _drawn(cache, split)
    return {"img_suffix": ".png", "data_prefix": {"img_path": str(top / "images"), "seg_map_path": str(top / "labels")}}
