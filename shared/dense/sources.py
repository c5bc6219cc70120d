"""Where the images and annotations of detection and segmentation are under the data root, as mmdet and mmseg read them.

coco      COCO 2017 as its distributor packs it: coco/annotations, coco/train2017, coco/val2017
coco256   128 images of either split with boxes and polygons as YOLO's text (coco128x2_s320), which says that a
          pipeline runs and is too small for an AP that means anything
ade20k    ADE20K's scene parsing benchmark: ADEChallengeData2016/images and /annotations
camvid    CamVid at 240 x 180 with 11 classes: camvid_half/{train,val,test} and .../{train,val,test}annot
shapes    embedded: images that are drawn (``shapes.py``)

The validation images of COCO and ADE20K serve as test, as everywhere in the literature; CamVid has its own.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.folders import list_images, require_checksum
from shared.data.manifest import checked_root, load_manifest, locate
from shared.dense import shapes, yolo
from shared.dense.config import MANIFESTS
from shared.errors import UserError

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Source:
    """``kind``; ``type``, mmdet's or mmseg's data set; ``files(root, split, cache)``, by which it finds them.

    ``classes``: names in order, None where the data
    set has them itself. ``void``: a label that counts for nothing. ``cache`` is a folder for what is made of the data.
    """

    kind: str
    type: str
    files: Callable[[Path, str, Path], dict[str, Any]]
    classes: tuple[str, ...] | None = None
    void: int | None = None


def _coco(root: Path, split: str, cache: Path) -> dict[str, Any]:
    name = {"train": "train2017", "test": "val2017"}[split]
    return {
        "ann_file": str(root / f"coco/annotations/instances_{name}.json"),
        "data_prefix": {"img": str(root / f"coco/{name}")},
    }


def _ade20k(root: Path, split: str, cache: Path) -> dict[str, Any]:
    name, top = {"train": "training", "test": "validation"}[split], root / "ADEChallengeData2016"
    return {"data_prefix": {"img_path": str(top / "images" / name), "seg_map_path": str(top / "annotations" / name)}}


def _camvid(root: Path, split: str, cache: Path) -> dict[str, Any]:
    top = root / "camvid_half"
    return {"data_prefix": {"img_path": str(top / split), "seg_map_path": str(top / f"{split}annot")}}


SOURCES = {
    "coco": Source("detection", "CocoDataset", _coco),
    "coco256": Source("detection", "CocoDataset", yolo.files),
    "ade20k": Source("segmentation", "ADE20KDataset", _ade20k),
    "camvid": Source("segmentation", "BaseSegDataset", _camvid, CAMVID, void=11),
    "shapes": Source("detection", "CocoDataset", shapes.boxes, shapes.CLASSES),
    "shapes-labels": Source("segmentation", "BaseSegDataset", shapes.labels, ("background", *shapes.CLASSES)),
}


def source_of(dense) -> Source:
    """Return the source of ``dense.data.source``; UserError for one that is unknown or of the other kind."""
    fitting = [name for name, source in SOURCES.items() if source.kind == dense.kind]
    if dense.data.source not in fitting:
        raise UserError(
            f"dense.data.source={dense.data.source} is no source for {dense.kind}: choose one of {', '.join(fitting)}"
        )
    return SOURCES[dense.data.source]


@functools.cache
def require_data(name: str, data_root: Path) -> None:
    """Raise UserError where a file or a folder is missing, has other numbers or, where they are known, other bytes.

    Once a process: a test set is opened again for every scoring.
    """
    manifest = load_manifest(name)
    for file in manifest.files:
        locate(manifest, data_root, file.path)
    for folder in manifest.folders:
        listing = list_images(manifest, folder, data_root)
        if folder.sha256 is not None:
            images = map(listing.path, range(len(listing.paths)))
            digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in images)
            require_checksum(manifest, folder, listing, digests)


def files_of(dense, split: str, data_root, cache: Path) -> dict[str, Any]:
    """Return the arguments by which mmdet or mmseg finds a split; UserError for data that are missing or others."""
    source, root, named = source_of(dense), Path(), MANIFESTS.get(dense.data.source)
    if named is not None:
        root = checked_root(data_root, f"set DATA_ROOT=<folder>, source: {load_manifest(named).source}")
        require_data(named, root)
    return source.files(root, split, cache)
