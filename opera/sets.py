"""The sets of OPERA's transfer that have lists of their own: Flowers-102 and Oxford-IIIT Pets, as published.

Image files of any size. The images of Flowers to train and to validate train together, as transfer to it is reported.
Manifests give sources, layouts and counts.
"""

from pathlib import Path

import numpy as np
import scipy.io

from shared.data.folders import Listing
from shared.data.images import ImageFiles, ImageSet, image_set_names, load_image_set, require_known
from shared.data.manifest import Manifest, load_manifest, locate

FLOWERS, PETS = 102, 37  # classes


def load_classification_set(name: str, split: str, data_root: str | Path | None) -> ImageSet:
    """Return a split, "train" or "test", of a set of this file or of ``load_image_set``.

    Raises UserError for an unknown set or split, and for data that are missing or other ones.
    """
    require_known(name, split, [*image_set_names(), *READERS])
    if name not in READERS:
        return load_image_set(name, split, data_root)
    manifest = load_manifest(name)
    files = {Path(entry.path).name: locate(manifest, data_root, entry.path) for entry in manifest.files}
    return _listed(manifest, split, Path(data_root), files)


def _listed(manifest: Manifest, split: str, root: Path, files: dict[str, Path]) -> ImageFiles:
    """Return the images of a list; UserError where it names other ones than are published, or one is missing."""
    folder = root / Path(manifest.files[0].path).parts[0]
    try:
        paths, labels, classes = READERS[manifest.name](files, split)
    except (KeyError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        raise manifest.wrong(f"the lists of {manifest.title} in {folder} cannot be read ({error})") from error
    expected, seen = manifest.counts["images"][split == "test"], set(labels.tolist())
    if len(paths) != expected or seen != set(range(len(classes))):
        images = f"{len(paths)} images of {len(seen)} classes to {split}, not {expected} of {len(classes)}"
        raise manifest.wrong(f"the lists in {folder} name {images}")
    for path in paths:
        if not (folder / path).is_file():
            raise manifest.wrong(f"{folder / path} is missing, which the lists name")
    listing = Listing(folder, classes, labels, np.array([path.encode() for path in paths]))
    return ImageFiles(listing, manifest.source)


Read = tuple[list[str], np.ndarray, tuple[str, ...]]  # paths below the set's folder, labels from 0, classes


def _flowers(files: dict[str, Path], split: str) -> Read:
    labels = scipy.io.loadmat(files["imagelabels.mat"])["labels"].ravel()
    parts = scipy.io.loadmat(files["setid.mat"])
    keys = ("trnid", "valid") if split == "train" else ("tstid",)
    numbers = np.sort(np.concatenate([parts[key].ravel() for key in keys]).astype(np.int64))  # from 1
    paths = [f"jpg/image_{number:05d}.jpg" for number in numbers]
    return paths, labels[numbers - 1].astype(np.int64) - 1, tuple(str(1 + label) for label in range(FLOWERS))


def _pets(files: dict[str, Path], split: str) -> Read:
    """Lines of name, class (from 1), species, breed."""
    lines = files["trainval.txt" if split == "train" else "test.txt"].read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    labels = np.array([int(row[1]) for row in rows], np.int64) - 1
    names = {label: row[0].rsplit("_", 1)[0] for row, label in zip(rows, labels.tolist(), strict=True)}
    classes = tuple(names.get(label, str(label)) for label in range(PETS))
    return [f"images/{row[0]}.jpg" for row in rows], labels, classes


READERS = {"flowers102": _flowers, "pets": _pets}
