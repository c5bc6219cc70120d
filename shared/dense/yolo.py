"""The 256 images of COCO whose boxes and polygons are YOLO's text, as COCO's own annotation files.

A line of ``instance_segmentation/labels/<split>/<image>.txt`` is a class, COCO's own number, and the corners of a
polygon as fractions of width and height. Several lines cannot be told to be parts of one object, so each is an object.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.dense.libraries import detection
from shared.errors import UserError
from shared.files import write_text

FOLDER = "coco128x2_s320"
MISSING = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of COCO's numbers 1 to 90, which name 80 classes
NUMBERS = [number for number in range(1, 91) if number not in MISSING]


def _objects(path: Path, width: int, height: int) -> list[dict[str, Any]]:
    objects = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            number, *values = line.split()
            corners = np.array(values, float).reshape(-1, 2) * (width, height)
            category = NUMBERS[NUMBERS.index(int(number))]
            if len(corners) < 3:
                raise ValueError("a polygon has three corners or more")
        except ValueError as error:
            raise UserError(f"{path}: {line[:40]!r} is no class and polygon: get the data again") from error
        low, high = corners.min(0), corners.max(0)
        x, y = corners.T
        area = abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
        box = [*map(float, low), *map(float, high - low)]
        objects.append({"category_id": category, "bbox": box, "area": area, "segmentation": [corners.ravel().tolist()]})
    return objects


def annotations(root: Path, split: str, classes: tuple[str, ...]) -> dict[str, list]:
    """Return a split, train2017 or val2017, in COCO's terms; ``classes`` are COCO's 80 names in order."""
    content: dict[str, list] = {"images": [], "annotations": []}
    content["categories"] = [{"id": n, "name": name} for n, name in zip(NUMBERS, classes, strict=True)]
    for path in sorted((root / FOLDER / "images" / split).glob("*.jpg")):
        labels = root / FOLDER / "instance_segmentation/labels" / split / f"{path.stem}.txt"
        if not labels.exists():
            continue  # of 128 images 100 have polygons
        with Image.open(path) as image:
            width, height = image.size
        number = int(path.stem)
        content["images"].append({"id": number, "file_name": path.name, "width": width, "height": height})
        for thing in _objects(labels, width, height):
            thing |= {"id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": 0}
            content["annotations"].append(thing)
    return content


def files(root: Path, split: str, cache: Path) -> dict[str, Any]:
    """Write the annotations of a split into ``cache`` and return where its files are, in mmdet's terms."""
    name = {"train": "train2017", "test": "val2017"}[split]
    file = cache / f"coco256-{name}.json"
    classes = detection().registry.DATASETS.get("CocoDataset").METAINFO["classes"]  # the names of COCO's numbers
    write_text(file, json.dumps(annotations(root, name, classes)))
    return {"ann_file": str(file), "data_prefix": {"img": str(root / FOLDER / "images" / name)}}
