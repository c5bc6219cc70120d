"""Image-classification data sets, one split at a time, and the batches that a training or a test takes from them.

The sets are the scikit-learn digits (embedded), CIFAR-10 and CIFAR-100 as published, whose pickles torchvision reads
after it has compared their checksums, and every manifest with ``folders``. Where that gives a size, the images are
decoded once, their checksums compared, into a uint8 array that is mapped into memory ever after, outside the data
root, which may be read-only: ``${XDG_CACHE_HOME:-~/.cache}/visrep/<name>-<split>-<sha256>-<decoder>.npy``. Other sets
are decoded image by image. Decoder: torchvision.io (RGB; grey and CMYK are converted).
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image

from shared.data.augment import Augmentation
from shared.data.folders import Listing, list_images, require_checksum
from shared.data.keyed import keyed_bits, keyed_places, stream
from shared.data.manifest import ImageFolder, Manifest, load_manifest, locate, manifest_names
from shared.errors import UserError
from shared.files import whole_file

LOGGER = logging.getLogger(__name__)
SUBSET = stream("subset")
DIGITS_TRAIN, DIGITS_SEED = 0.8, 0
CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
KEPT_BYTES = 2**28  # of decoded images of a set: all of a small set, a negligible part of a large one


class ImageSet:
    """One split: ``classes`` are names, ``labels`` (n,) int64 their numbers; images are uint8 RGB."""

    def __init__(self, classes: tuple[str, ...], labels: np.ndarray):
        self.classes, self.labels = classes, labels

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 (3, H, W); UserError where its file is missing or damaged."""
        return self.batch(np.array([index]))[0]

    def batch(self, indices: np.ndarray) -> Tensor | list[Tensor]:
        """Return images: uint8 (b, 3, H, W) where all of the set have one size, else a list of (3, H, W)."""
        return [self.image(index) for index in indices]


class ArrayImages(ImageSet):
    """Images of one size in one array ``pixels`` (n, 3, H, W) uint8, in memory or mapped from a file."""

    def __init__(self, classes: tuple[str, ...], labels: np.ndarray, pixels: np.ndarray):
        super().__init__(classes, labels)
        self.pixels = pixels

    def batch(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.pixels[indices])


class ImageFiles(ImageSet):
    """Images of any size, decoded when they are asked for; the first KEPT_BYTES of them only once in a process."""

    def __init__(self, listing: Listing, source: str):
        super().__init__(listing.classes, listing.labels)
        self.listing, self.source = listing, source
        self.kept, self.room = {}, KEPT_BYTES

    def image(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        image = read_image(self.listing.path(index), self.source)[0]
        if image.nbytes <= self.room:
            self.kept[index], self.room = image, self.room - image.nbytes
        return image


def read_image(path: Path, source: str) -> tuple[Tensor, str]:
    """Return an image file as uint8 (3, H, W) RGB and its sha256; UserError where it is missing or damaged."""
    try:
        content = np.fromfile(path, np.uint8)
        image = decode_image(torch.from_numpy(content), ImageReadMode.RGB)
        if image.dtype != torch.uint8:
            raise ValueError("more than 8 bits per colour")
        if image.dim() != 3:
            raise ValueError("an animation, several images in one file")
    except (OSError, RuntimeError, ValueError) as error:
        # Without the place in torchvision's own code.
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0].split(". ")[0])
        wrong = f"{path} is missing, truncated or no image ({reason})"
        raise UserError(f"{wrong}: get the file again, source: {source}") from error
    return image, hashlib.sha256(content).hexdigest()


def cache_folder() -> Path:
    """Return the folder of the decoded arrays."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visrep"


def _decode(manifest: Manifest, folder: ImageFolder, listing: Listing) -> np.ndarray:
    """Return the pixels (n, 3, size, size) uint8 of a split, comparing sizes and checksums."""
    pixels, digests = np.empty((len(listing.labels), 3, folder.size, folder.size), np.uint8), []
    for index, target in enumerate(pixels):
        path = listing.path(index)
        image, digest = read_image(path, manifest.source)
        if image.shape != target.shape:
            size = f"{image.shape[2]} x {image.shape[1]} pixels, not {folder.size} x {folder.size}"
            raise manifest.wrong(f"{path} has {size}")
        target[:] = image.numpy()
        digests.append(digest)
    require_checksum(manifest, folder, listing, digests)
    return pixels


def _decode_once(manifest: Manifest, folder: ImageFolder, listing: Listing) -> np.ndarray:
    """Return the pixels of a split from the cache; one that cannot be written is no reason to stop."""
    version = torchvision.__version__.split("+")[0]
    name = f"{manifest.name}-{folder.split}-{folder.sha256[:16]}-torchvision{version}.npy"
    path, shape = cache_folder() / name, (len(listing.labels), 3, folder.size, folder.size)
    with contextlib.suppress(OSError, ValueError, EOFError):  # there is none, or half of one
        pixels = np.load(path, mmap_mode="r")
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    LOGGER.info("decoding %d images of %s once, into %s", len(listing.labels), manifest.name, path)
    pixels = _decode(manifest, folder, listing)
    try:
        with whole_file(path) as file:
            np.save(file, pixels)
        return np.load(path, mmap_mode="r")
    except OSError as error:
        LOGGER.warning("the decoded images could not be kept in %s: %s", path, error)
        return pixels


def load_digits(classes: Iterable[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits (the test part of UCI's): images (n, 8, 8) float32 in [0, 1], labels (n,) int64.

    Of some classes, which keep their numbers, or of all ten (n = 1797). Raises ValueError for one that is not 0 to 9.
    """
    chosen = sorted(set(range(10) if classes is None else classes))
    if not chosen or not set(chosen) <= set(range(10)):
        raise ValueError(f"digits has the classes 0 to 9, asked for {chosen}")
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    kept = np.isin(labels, chosen)
    return (images[kept] / 16).astype(np.float32).reshape(-1, 8, 8), labels[kept].astype(np.int64)


def split_by_index(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted train and test indices, int64: ``fraction`` of every class (rounded) to train.

    The draw is keyed by (seed, index), the same on every machine. Every class keeps at least one image on
    each side. Raises ValueError for a fraction outside (0, 1) or a class with one image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction must lie between 0 and 1, got {fraction}")
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    for name in names[sizes < 2]:
        raise ValueError(f"class {name} has one image and cannot be split")
    counts = np.clip(np.rint(fraction * sizes), 1, sizes - 1)
    in_train = keyed_places(labels, seed) < counts[inverse]
    return np.flatnonzero(in_train), np.flatnonzero(~in_train)


def _digits(split: str) -> ArrayImages:
    images, labels = load_digits()
    chosen = split_by_index(labels, DIGITS_TRAIN, DIGITS_SEED)[split == "test"]
    grey = (images[chosen] * 255).round().astype(np.uint8)  # (n, 8, 8)
    pixels = np.repeat(grey[:, None], 3, axis=1)  # (n, 3, 8, 8)
    return ArrayImages(tuple(map(str, range(10))), labels[chosen], pixels)


def _cifar(manifest: Manifest, split: str, data_root: str | Path | None) -> ArrayImages:
    for entry in manifest.files:
        locate(manifest, data_root, entry.path)
    try:
        images = CIFAR[manifest.name](root=str(data_root), train=split == "train", download=False)
    except RuntimeError as error:
        raise manifest.wrong(f"{manifest.name} in {data_root} is not as published") from error
    pixels = np.ascontiguousarray(images.data.transpose(0, 3, 1, 2))  # (n, 3, 32, 32)
    return ArrayImages(tuple(images.classes), np.asarray(images.targets, np.int64), pixels)


def image_set_names() -> list[str]:
    """Return the names that ``load_image_set`` knows."""
    return ["digits", *(name for name in manifest_names() if load_manifest(name).folders), *CIFAR]


def require_known(name: str, split: str, names: list[str]) -> None:
    """Raise UserError for a set that is none of the names and for a split that is neither "train" nor "test"."""
    if name not in names:
        choice = f"choose one of {', '.join(names)}, or describe yours in shared/data/manifests"
        raise UserError(f"there is no image set {name!r}: {choice}")
    if split not in ("train", "test"):
        raise UserError(f"{name} has no split {split!r}: choose train or test")


def load_image_set(name: str, split: str, data_root: str | Path | None) -> ImageSet:
    """Return a split, "train" or "test", of a data set; the test split of a set that has "val" is that one.

    Classes are numbered in the order of their names, images stand in the order of their paths. Digits: 80 % of
    every class are "train". Raises UserError for an unknown set or split, for data that are missing or not the
    manifest's, and for an image that is damaged or of another size than its set has.
    """
    require_known(name, split, image_set_names())
    if name == "digits":
        return _digits(split)
    manifest = load_manifest(name)
    if name in CIFAR:
        return _cifar(manifest, split, data_root)
    folder = next((folder for folder in manifest.folders if folder.split == split), None)
    if folder is None:
        raise UserError(f"{name} has no split {split!r}: choose the other one")
    listing = list_images(manifest, folder, data_root)
    if folder.size is None:
        return ImageFiles(listing, manifest.source)
    return ArrayImages(listing.classes, listing.labels, _decode_once(manifest, folder, listing))


def keyed_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return sorted indices (count,) int64 of a class-balanced subset, a function of (seed, index).

    Classes differ by at most one image as far as they have enough; a smaller subset is part of a larger one.
    Raises UserError where there are fewer images than asked for.
    """
    if not 1 <= count <= len(labels):
        raise UserError(f"a subset of {count} images out of {len(labels)}: ask for 1 to {len(labels)}")
    bits = keyed_bits(SUBSET, seed, np.arange(len(labels)))
    return np.sort(np.lexsort((bits, keyed_places(labels, SUBSET, seed)))[:count])


@dataclass(eq=False)
class Batches(Dataset):
    """From (epoch, samples) to a batch; a pure function of them and of the seed, whatever the workers.

    ``samples`` count through ``chosen`` (indices into the set; all of it where None), so a KeyedBatchSampler is made
    with ``len(batches)``; a sample of len(batches) or more is a further view of an image, as its ``repeats`` gives.
    The result: images float32 (b, 3, S, S), labels (b,) int64, indices (b,) int64 into the image set. Without
    ``train`` the images are those of a test: resized, cut from the middle, normalised; the epoch does not matter.
    """

    images: ImageSet
    augmentation: Augmentation
    seed: int
    train: bool = True
    chosen: np.ndarray | None = None

    def __post_init__(self):
        self.chosen = np.asarray(range(len(self.images)) if self.chosen is None else self.chosen, np.int64)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, batch: tuple[int, Sequence[int]]) -> dict[str, Tensor]:
        epoch, samples = batch
        view, position = np.divmod(np.asarray(samples, np.int64), len(self))
        index = self.chosen[position]
        images, augment = self.images.batch(index), self.augmentation
        key = self.seed, epoch, index, view
        images = augment.train(images, key) if self.train else augment.evaluate(images)
        labels = torch.from_numpy(self.images.labels[index])
        return {"images": images, "labels": labels, "indices": torch.from_numpy(index)}


class OrderedBatches(Dataset):
    """Batches by their number: samples in order, ``size`` at a time, ``at_most`` so many in all (None: every one)."""

    def __init__(self, batches: Batches, size: int, at_most: int | None = None):
        self.batches, self.size = batches, size
        self.samples = len(batches) if at_most is None else min(at_most, len(batches))

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(number)  # ends an iteration
        begin = number * self.size
        return self.batches[(0, range(begin, min(begin + self.size, self.samples)))]
