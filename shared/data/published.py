"""Classification sets as they are published: CIFAR-10 and CIFAR-100, Flowers-102, Oxford-IIIT Pets.

CIFAR's files are pickles, which torchvision reads after it has compared their checksums. Flowers and Pets are image
files of any size with their own lists: of Flowers the 1,020 images to train and the 1,020 to validate train together,
as transfer to it is reported. Manifests give sources, layouts and counts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
import torchvision

from shared.data.folders import Listing
from shared.data.images import ArrayImages, ImageFiles, ImageSet, image_set_names, load_image_set
from shared.data.manifest import Manifest, load_manifest, locate
from shared.errors import UserError

CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
FLOWERS, PETS = 102, 37  # classes


def classification_set_names() -> list[str]:
    """Return the names that ``load_classification_set`` knows."""
    return [*image_set_names(), *CIFAR, *READERS]


def load_classification_set(name: str, split: str, data_root: str | Path | None) -> ImageSet:
    """Return a split, "train" or "test", of a published set or of an image set of ``images.load_image_set``.

    Raises UserError for an unknown set or split, and for data that are missing or other ones.
    """
    if name not in CIFAR and name not in READERS:
        if name not in image_set_names():
            raise UserError(
                f"there is no image set {name!r}: choose one of {', '.join(classification_set_names())}, or describe "
                "yours in shared/data/manifests"
            )
        return load_image_set(name, split, data_root)
    if split not in ("train", "test"):
        raise UserError(f"{name} has no split {split!r}: choose train or test")
    manifest = load_manifest(name)
    files = {Path(entry.path).name: locate(manifest, data_root, entry.path) for entry in manifest.files}
    if name in CIFAR:
        return _cifar(name, split, data_root, manifest)
    folder = Path(data_root) / Path(manifest.files[0].path).parts[0]
    try:
        paths, labels, classes = READERS[name](files, split)
    except (KeyError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"the lists of {manifest.title} in {folder} cannot be read ({error}): get the data again, source: "
            f"{manifest.source}"
        ) from error
    _require_whole(manifest, folder, split, paths, labels, len(classes))
    listing = Listing(folder, classes, labels, np.array([path.encode() for path in paths]))
    return ImageFiles(listing, manifest.source)


def _cifar(name: str, split: str, data_root, manifest: Manifest) -> ArrayImages:
    try:
        images = CIFAR[name](root=str(data_root), train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(
            f"{name} in {data_root} is not as published: get the data again, source: {manifest.source}"
        ) from error
    pixels = np.ascontiguousarray(images.data.transpose(0, 3, 1, 2))  # (n, 3, 32, 32)
    return ArrayImages(tuple(images.classes), np.asarray(images.targets, np.int64), pixels)


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


READERS: dict[str, Callable[[dict[str, Path], str], Read]] = {"flowers102": _flowers, "pets": _pets}


def _require_whole(
    manifest: Manifest, folder: Path, split: str, paths, labels: np.ndarray, classes: int
) -> None:
    """Raise UserError where a list has other images or classes than are published, or an image is missing."""
    again = f"get the data again, source: {manifest.source}"
    expected = manifest.counts["images"][split == "test"]
    if len(paths) != expected or set(labels.tolist()) != set(range(classes)):
        raise UserError(
            f"the lists in {folder} name {len(paths)} images of {len(set(labels.tolist()))} classes to {split}, not "
            f"{expected} of {classes}: {again}"
        )
    for path in paths:
        if not (folder / path).is_file():
            raise UserError(f"{folder / path} is missing, which the lists name: {again}")
