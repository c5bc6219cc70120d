"""Folders of images: which classes and files a split has, and whether they are the ones that its manifest names.

Thousands of files cannot be named one by one. A manifest gives for every split the number of classes, the number
of images and one sha256 over the listing: a line ``<sha256 of the file>  <path relative to the folder>`` for every
file, sorted by path byte by byte, which is what ``sha256sum`` prints.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # what torchvision decodes; other files are passed over


class ImageFolder(BaseModel):
    """One split: a folder per class, or a file that gives the class of every image."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    split: Literal["train", "test"]
    path: str  # relative to the data root
    classes: int
    images: int  # in all
    per_class: (
        int | list[int] | None
    )  # of every class, in the order of the classes' names; None: not compared
    labels_file: str | None = None  # relative to `path`; lines: file name, tab, class, further columns
    size: int | None = None  # every image has size x size pixels; such a set is decoded once
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")  # of the listing; None: only numbers are compared

    @model_validator(mode="after")
    def _held_sets_have_a_checksum(self):
        if self.size is not None and self.sha256 is None:
            raise ValueError("images with a size are kept under their sha256, which must be given")
        return self


@dataclass(frozen=True)
class Listing:
    """The images of a split, sorted by path: class names, labels (n,) int64, paths (n,) bytes below ``root``."""

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    paths: np.ndarray  # bytes, not str: one object, which worker processes share without copying

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])


def _again(source: str) -> str:
    return f"get the data again, source: {source}"


def _images_below(root: Path) -> list[str]:
    """Return the paths of all images below a folder, relative to it, sorted."""
    paths = [
        os.path.join(folder, file) for folder, _, files in os.walk(root, followlinks=True) for file in files
    ]
    images = [os.path.relpath(path, root) for path in paths if path.lower().endswith(SUFFIXES)]
    return sorted(images, key=os.fsencode)


def _annotations(path: Path, source: str) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"{path}, which gives the classes of the images, is missing: {_again(source)}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{path} has a line without a tab and a class: {_again(source)}")
    return {row[0]: row[1] for row in rows}


def class_names(folder: ImageFolder, data_root: Path, source: str) -> tuple[str, ...]:
    """Return the sorted names of the classes of a split that is there."""
    root = data_root / folder.path
    if folder.labels_file:
        return tuple(sorted(set(_annotations(root / folder.labels_file, source).values())))
    return tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))


def list_images(folder: ImageFolder, data_root: Path, source: str) -> Listing:
    """Return the images of a split after comparing the numbers of classes and images with the manifest.

    Raises UserError, which names the folder, for a missing folder or annotation, an empty class folder, and
    numbers that differ.
    """
    root = data_root / folder.path
    if not root.is_dir():
        raise UserError(
            f"{folder.path} is missing in DATA_ROOT={data_root}: set DATA_ROOT=<folder>, put {folder.path} there, "
            f"source: {source}"
        )
    names, paths = class_names(folder, data_root, source), _images_below(root)
    if folder.labels_file:
        known = _annotations(root / folder.labels_file, source)
        owners = [known.get(path.rsplit("/", 1)[-1]) for path in paths]
    else:
        owners = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    if None in owners:
        stray = root / paths[owners.index(None)]
        raise UserError(f"{stray} belongs to no class: move it away, or {_again(source)}")
    number = {name: label for label, name in enumerate(names)}
    labels = np.array([number[owner] for owner in owners], np.int64)
    _require_numbers(folder, root, names, labels, source)
    return Listing(root, names, labels, np.array([os.fsencode(path) for path in paths]))


def _require_numbers(folder: ImageFolder, root: Path, names: tuple, labels: np.ndarray, source: str) -> None:
    if len(names) != folder.classes:
        raise UserError(f"{root} has {len(names)} classes, not {folder.classes}: {_again(source)}")
    counts = np.bincount(labels, minlength=len(names))
    for name in (names[label] for label in np.flatnonzero(counts == 0)):
        where = f"{root} has no image of class {name}" if folder.labels_file else f"{root / name} is empty"
        raise UserError(f"{where}: {_again(source)}")
    if folder.per_class is not None:
        expected = np.broadcast_to(folder.per_class, counts.shape)
        for label in np.flatnonzero(counts != expected):
            images = f"{counts[label]} images of class {names[label]}, not {expected[label]}"
            raise UserError(f"{root} has {images}: {_again(source)}")
    if len(labels) != folder.images:
        raise UserError(f"{root} has {len(labels)} images, not {folder.images}: {_again(source)}")


def require_same_classes(folders: Iterable[ImageFolder], data_root: Path, source: str) -> None:
    """Raise UserError where two splits that are both there have different classes, and name one of those."""
    there = [folder for folder in folders if (data_root / folder.path).is_dir()]
    for first, second in itertools.permutations(there, 2):
        lacking = set(class_names(first, data_root, source)) - set(class_names(second, data_root, source))
        for name in sorted(lacking):
            missing = f"class {name}, which {first.path} has"
            raise UserError(f"{data_root / second.path} has no {missing}: {_again(source)}")


def listing_sha256(digests: Iterable[str], listing: Listing, labels_file: str | None) -> str:
    """Return the sha256 over the listing, given every image's own; a labels file is one more line, the last."""
    total = hashlib.sha256()
    for digest, path in zip(digests, listing.paths, strict=True):
        total.update(f"{digest}  ".encode() + path + b"\n")
    if labels_file:
        digest = hashlib.sha256((listing.root / labels_file).read_bytes()).hexdigest()
        total.update(f"{digest}  {labels_file}\n".encode())
    return total.hexdigest()


def require_checksum(folder: ImageFolder, root: Path, digest: str, source: str) -> None:
    """Raise UserError where the sha256 of the listing is known and differs."""
    if folder.sha256 is not None and digest != folder.sha256:
        expected = f"expected sha256 {folder.sha256} over its listing, found {digest}"
        raise UserError(f"{root} has the wrong checksum: {expected}; {_again(source)}")


def check_images(folder: ImageFolder, data_root: Path, source: str) -> str:
    """Compare a split with its manifest, every byte where a sha256 is known, and return a phrase about it."""
    listing = list_images(folder, data_root, source)
    phrase = f"{len(listing.classes)} classes, {len(listing.labels)} images"
    if folder.sha256 is None:
        return f"{phrase}, no checksum known"
    digests = (hashlib.sha256(listing.path(i).read_bytes()).hexdigest() for i in range(len(listing.labels)))
    require_checksum(folder, listing.root, listing_sha256(digests, listing, folder.labels_file), source)
    return phrase
