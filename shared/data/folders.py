"""Folders of images: which classes and files a split has, and whether they are the ones that its manifest names.

A manifest gives for every split the numbers of classes and images and one sha256 over the listing: what ``sha256sum``
prints for every image, ``<sha256>  <path below the folder>``, sorted by path byte by byte, and for a labels file last.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.data.manifest import ImageFolder, Manifest, require_there

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # what torchvision decodes; other files are passed over


@dataclass(frozen=True)
class Listing:
    """The images of a split, sorted by path: class names, labels (n,) int64, paths (n,) bytes below ``root``."""

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    paths: np.ndarray  # bytes, not str: one object, which worker processes share without copying

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])


def _image_paths(root: Path) -> list[str]:
    """Return the paths of all images below a folder, relative to it, sorted."""
    start, walk = len(os.path.join(root, "")), os.walk(root, followlinks=True)
    paths = (os.path.join(folder, file)[start:] for folder, _, files in walk for file in files)
    return sorted((path for path in paths if path.lower().endswith(SUFFIXES)), key=os.fsencode)


def _annotations(manifest: Manifest, path: Path) -> dict[str, str]:
    """Return the class of every file name that a labels file gives."""
    if not path.is_file():
        raise manifest.wrong(f"{path}, which gives the classes of the images, is missing")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line]
    if any(len(row) < 2 for row in rows):
        raise manifest.wrong(f"{path} has a line without a tab and a class")
    return {row[0]: row[1] for row in rows}


def _class_names(manifest: Manifest, folder: ImageFolder, root: Path) -> list[str]:
    if folder.labels_file:
        return sorted(set(_annotations(manifest, root / folder.labels_file).values()))
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def list_images(manifest: Manifest, folder: ImageFolder, data_root: str | Path | None) -> Listing:
    """Return the images of a split after comparing the numbers of classes and images with the manifest.

    Raises UserError, which names the folder, for a missing folder or annotation, an empty class folder, numbers
    that differ, and a class that another split has and this one lacks.
    """
    root = require_there(manifest, data_root, folder)
    _require_same_classes(manifest, Path(data_root))
    names, paths = _class_names(manifest, folder, root), _image_paths(root)
    if folder.classes is None:  # all alike: what is in an image stands in another folder or a file
        names, owners = ["."], ["."] * len(paths)
    elif folder.labels_file:
        known = _annotations(manifest, root / folder.labels_file)
        owners = [known.get(path.rsplit("/", 1)[-1]) for path in paths]
    else:
        owners = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    if None in owners:
        stray = root / paths[owners.index(None)]
        raise manifest.wrong(f"{stray} belongs to no class", "move it away, or get the data again")
    number = {name: label for label, name in enumerate(names)}
    labels = np.array([number[owner] for owner in owners], np.int64)
    listing = Listing(root, tuple(names), labels, np.array([os.fsencode(path) for path in paths]))
    _require_numbers(manifest, folder, listing)
    return listing


def _require_numbers(manifest: Manifest, folder: ImageFolder, listing: Listing) -> None:
    root, names, labels = listing.root, listing.classes, listing.labels
    if folder.classes is not None and len(names) != folder.classes:
        raise manifest.wrong(f"{root} has {len(names)} classes, not {folder.classes}")
    counts = np.bincount(labels, minlength=len(names))
    for name in np.array(names)[counts == 0][:1]:
        empty = f"{root} has no image of class {name}" if folder.labels_file else f"{root / name} is empty"
        raise manifest.wrong(empty)
    if folder.per_class is not None:
        expected = np.broadcast_to(folder.per_class, counts.shape)
        for label in np.flatnonzero(counts != expected)[:1]:
            count = f"{counts[label]} images of class {names[label]}, not {expected[label]}"
            raise manifest.wrong(f"{root} has {count}")
    if len(labels) != folder.images:
        raise manifest.wrong(f"{root} has {len(labels)} images, not {folder.images}")


def _require_same_classes(manifest: Manifest, data_root: Path) -> None:
    """Compare the splits that are there."""
    there = [folder for folder in manifest.folders if folder.classes is not None and folder.is_in(data_root)]
    names = {folder.path: set(_class_names(manifest, folder, data_root / folder.path)) for folder in there}
    for path, other in itertools.permutations(names, 2):
        for name in sorted(names[path] - names[other])[:1]:
            raise manifest.wrong(f"{data_root / other} has no class {name}, which {path} has")


def require_checksum(manifest: Manifest, folder: ImageFolder, listing: Listing, digests: Iterable) -> None:
    """Raise UserError where the sha256 over the listing differs, given every image's own, a string."""
    total = hashlib.sha256()
    for digest, path in zip(digests, listing.paths, strict=True):
        total.update(f"{digest}  ".encode() + path + b"\n")
    if folder.labels_file:
        digest = hashlib.sha256((listing.root / folder.labels_file).read_bytes()).hexdigest()
        total.update(f"{digest}  {folder.labels_file}\n".encode())
    if total.hexdigest() != folder.sha256:
        expected = f"expected sha256 {folder.sha256} over its listing, found {total.hexdigest()}"
        raise manifest.wrong(f"{listing.root} has the wrong checksum: {expected}")
