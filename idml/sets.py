"""Retrieval data sets: the classes that train are not those that test.

CUB-200-2011 (classes 1-100 / 101-200), Cars196 (1-98 / 99-196), Stanford Online Products (its own two files), each as
published, and smaller packs of the first two: CUB's first 50 classes (1-25 / 26-50) and the training images of Cars196
alone. The digits of scikit-learn are split 0-4 / 5-9. Annotations are located through ``shared/data/manifests``, which
give their sources and checksums and the numbers of images and classes of either split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io

from shared.data.folders import Listing
from shared.data.images import ArrayImages, ImageFiles, ImageSet, load_digits
from shared.data.manifest import Manifest, load_manifest, locate
from shared.errors import UserError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Annotation:
    """An image: its path below the set's folder, the number of its class as published (from 1)."""

    path: str
    number: int


def _columns(path: Path, columns: int, again: str) -> list[list[str]]:
    """Return the words of every line; UserError for a line with another number of them."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split() for line in lines if line.strip()]
    for line, row in enumerate(rows, 1):
        if len(row) != columns:
            raise UserError(f"{path}, line {line}, has {len(row)} columns, not {columns}: {again}")
    return rows


def _integer(word: str, path: Path, again: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise UserError(f"{path} has {word!r} where a number is expected: {again}") from error


def _cub(files: dict[str, Path], classes: int, again: str) -> list[Annotation]:
    """``images.txt`` (number, path) and ``image_class_labels.txt`` (number, class)."""
    named = dict(_columns(files["images.txt"], 2, again))
    labelled = dict(_columns(files["image_class_labels.txt"], 2, again))
    if named.keys() != labelled.keys():
        odd = sorted(named.keys() ^ labelled.keys())[0]
        raise UserError(
            f"{files['images.txt']} and {files['image_class_labels.txt']} do not match, image {odd} is in one of them "
            f"alone: {again}"
        )
    path = files["image_class_labels.txt"]
    annotations = [Annotation(f"images/{named[key]}", _integer(labelled[key], path, again)) for key in named]
    return [annotation for annotation in annotations if annotation.number <= classes]


def _cars(files: dict[str, Path], classes: int, again: str) -> list[Annotation]:
    """A MATLAB struct array ``annotations``; of the file of training images alone the path lacks its folder."""
    (path,) = files.values()
    try:
        annotations = scipy.io.loadmat(path, squeeze_me=True)["annotations"]
        field, folder = (
            ("relative_im_path", "") if "relative_im_path" in annotations.dtype.names else ("fname", "cars_train/")
        )
        return [
            Annotation(folder + str(name), int(number))
            for name, number in zip(annotations[field], annotations["class"], strict=True)
        ]
    except Exception as error:  # the reader raises almost anything on damaged bytes
        raise UserError(f"{path} holds no annotations that can be read ({error}): {again}") from error


def _sop(files: dict[str, Path], classes: int, again: str) -> list[Annotation]:
    """``Ebay_train.txt`` and ``Ebay_test.txt``: image, class, super-class, path, under a line of names."""
    annotations = []
    for path in files.values():
        rows = _columns(path, 4, again)[1:]
        annotations += [Annotation(row[3], _integer(row[1], path, again)) for row in rows]
    return annotations


READERS: dict[str, Callable[[dict[str, Path], int, str], list[Annotation]]] = {
    "cub200": _cub,
    "cub50": _cub,
    "cars196": _cars,
    "cars196_train": _cars,
    "sop": _sop,
}


def retrieval_set_names() -> list[str]:
    """Return the names that ``load_retrieval_set`` knows."""
    return ["digits", *READERS]


def _digits(split: str) -> ArrayImages:
    images, labels = load_digits(range(5) if split == "train" else range(5, 10))
    grey = (images * 255).round().astype(np.uint8)  # (n, 8, 8)
    names = sorted(set(labels.tolist()))
    pixels = np.repeat(grey[:, None], 3, axis=1)  # (n, 3, 8, 8)
    return ArrayImages(tuple(map(str, names)), labels - names[0], pixels)


def _annotations(manifest: Manifest, data_root: str | Path | None) -> tuple[Path, list[Annotation]]:
    """Return the folder of a set and its annotations, by class and path, as many as the manifest counts."""
    again = f"get the data again, source: {manifest.source}"
    files = {Path(entry.path).name: locate(manifest, data_root, entry.path) for entry in manifest.files}
    root = Path(data_root) / Path(manifest.files[0].path).parts[0]
    classes = sum(manifest.counts["classes"])
    annotations = sorted(READERS[manifest.name](files, classes, again), key=lambda image: (image.number, image.path))
    numbers = sorted({annotation.number for annotation in annotations})
    expected = sum(manifest.counts["images"])
    if len(annotations) != expected or numbers != list(range(1, classes + 1)):
        raise UserError(
            f"the annotations in {root} name {len(annotations)} images of {len(numbers)} classes, not {expected} of "
            f"{classes}: {again}"
        )
    return root, annotations


def load_retrieval_set(name: str, split: str, data_root: str | Path | None) -> ImageSet:
    """Return the images of a split, "train" or "test", whose classes are numbered from 0 in their published order.

    Raises UserError for an unknown set or split, for data that are missing, and for annotations that do not match the
    images or the manifest.
    """
    if name not in retrieval_set_names() or split not in SPLITS:
        raise UserError(
            f"there is no retrieval set {name!r} with a split {split!r}: choose a set from "
            f"{', '.join(retrieval_set_names())}, a split from {', '.join(SPLITS)}"
        )
    if name == "digits":
        return _digits(split)
    manifest = load_manifest(name)
    root, annotations = _annotations(manifest, data_root)
    first = manifest.counts["classes"][0]
    chosen = [annotation for annotation in annotations if (annotation.number <= first) == (split == "train")]
    expected = manifest.counts["images"][SPLITS.index(split)]
    if len(chosen) != expected or not chosen:
        wanted = f"{len(chosen)} images, not {expected}" if chosen or expected else "no images"
        raise UserError(f"the {split} classes of {root} have {wanted}: get the data again, source: {manifest.source}")
    for annotation in chosen:
        if not (root / annotation.path).is_file():
            raise UserError(
                f"{root / annotation.path} is missing, which the annotations name: get the data again, source: "
                f"{manifest.source}"
            )
    labels = np.array([annotation.number for annotation in chosen], np.int64)
    names, labels = np.unique(labels, return_inverse=True)
    paths = np.array([annotation.path.encode() for annotation in chosen])
    return ImageFiles(Listing(root, tuple(map(str, names)), labels.astype(np.int64), paths), manifest.source)
