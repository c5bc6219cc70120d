"""Training and scored pixels of a scene: per class, official maps, or spatially disjoint blocks.

The abstract of arXiv 2211.08349 gives no split; every choice is ours. All draws are keyed, so a seed
names the same split on every machine. Random splits of overlapping patches leak: a patch around a test pixel
usually holds training pixels. The disjoint split has a guard band against that.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import maximum_filter

from pdml.config import SplitConfig
from shared.data.keyed import keyed_bits, keyed_permutation, stream
from shared.errors import UserError

PIXELS = stream("pdml.split.pixels")
BLOCKS = stream("pdml.split.blocks")


@dataclass(frozen=True)
class Split:
    """Which pixels train and which are scored."""

    train: np.ndarray  # (H, W) bool; may hold pixels of a class whose scored pixels the guard took away
    test: np.ndarray  # (H, W) bool: the scored pixels
    classes: np.ndarray  # (C,) bool: classes with training and scored pixels; the others are left out by name
    blocks: np.ndarray | None = None  # (H, W) int8: 0 = train side, 1 = test side; None unless disjoint

    def scored(self, labels: np.ndarray) -> np.ndarray:
        """Return the pixels (H, W) bool that count: test pixels of the classes that are not left out."""
        return self.test & np.concatenate([[False], self.classes])[labels]


def guard(train: np.ndarray, radius: int) -> np.ndarray:
    """Return (H, W) bool: pixels farther than 2 * radius (Chebyshev) from all of ``train`` (H, W) bool.

    Two overlapping patches of that radius reach 2 * radius: none that covers such a pixel holds a training
    pixel. Mirroring at the border only repeats pixels inside the same window, so it needs no extra width.
    """
    return ~maximum_filter(train, size=4 * radius + 1, mode="constant", cval=0)


def block_index(height: int, width: int, block: int) -> np.ndarray:
    """Return (H, W) int64, the number of each pixel's block: as many as fit with sides of at least ``block``.

    Remainders are spread over the blocks, so that their sides differ by one pixel at most.
    """
    rows, columns = max(height // block, 1), max(width // block, 1)
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    return row[:, None] * columns + column[None, :]


def training_counts(labels: np.ndarray, classes: int, split: SplitConfig, source: str) -> np.ndarray:
    """Return (C,) int64, how many training pixels each class gets.

    A percentage is rounded up and at least ``split.minimum``. Raises UserError for a class that would have no
    training or no test pixel; a disjoint split leaves such a class out by name instead.
    """
    sizes = np.bincount(labels.ravel(), minlength=classes + 1)[1:]
    if split.kind == "count":
        counts = np.full(classes, split.amount, np.int64)
    else:
        # Rounding first: 0.1 * 3000 / 100 must not become 3.0000000000000004 and then 4.
        exact = [math.ceil(round(split.amount * int(size) / 100, 9)) for size in sizes]
        counts = np.maximum(np.array(exact, np.int64), split.minimum)
    for number, (count, size) in enumerate(zip(counts, sizes, strict=True), start=1):
        if split.kind != "disjoint" and not 0 < count < size:
            raise UserError(
                f"{source}: class {number} has {size} labelled pixels, too few for {count} training "
                f"pixels and a test pixel; lower data.split.amount (now {split.amount}) or data.split.minimum"
            )
    return counts


def _draw(labels: np.ndarray, counts: np.ndarray, seed: int, allowed: np.ndarray) -> np.ndarray:
    """Return (H, W) bool with counts[c - 1] keyed pixels of each class c among the allowed ones."""
    train = np.zeros(labels.size, bool)
    for number, count in enumerate(counts, start=1):
        pixels = np.flatnonzero(((labels == number) & allowed).ravel())
        train[pixels[keyed_permutation(len(pixels), PIXELS, seed, number)[:count]]] = True
    return train.reshape(labels.shape)


def _present(labels: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels[mask], minlength=classes + 1)[1:] > 0


def _assignments(labels: np.ndarray, counts: np.ndarray, split: SplitConfig, seed: int):
    """Yield (classes on both sides, (H, W) int8 sides) of the seeded assignments, most classes first.

    A class is on the train side with its number of training pixels, on the test side with one pixel. Ties go
    to the most even halves of labelled pixels, then to the first assignment.
    """
    index = block_index(*labels.shape, split.block)
    blocks, classes = int(index.max()) + 1, len(counts)
    table = np.bincount((index * (classes + 1) + labels).ravel(), minlength=blocks * (classes + 1))
    table = table.reshape(blocks, classes + 1)[:, 1:]  # (blocks, C) pixels of each class in each block
    number = np.arange(split.assignments)
    side = keyed_bits(BLOCKS, seed, number[:, None], np.arange(blocks)[None]) & np.uint64(1)
    side = side.astype(np.int64)  # (assignments, blocks)
    test_pixels = side @ table  # (assignments, C)
    train_pixels = table.sum(0) - test_pixels
    both = ((train_pixels >= counts) & (test_pixels > 0)).sum(1)
    uneven = np.abs(train_pixels.sum(1) - test_pixels.sum(1))
    for chosen in np.lexsort((number, uneven, -both)):
        yield int(both[chosen]), side[chosen][index].astype(np.int8)


def _guarded(labels: np.ndarray, counts: np.ndarray, blocks: np.ndarray, seed: int, radius: int) -> Split:
    """Return the split for given sides: keyed training pixels of one, far enough pixels of the other."""
    classes = len(counts)
    on_train = np.bincount(labels[blocks == 0], minlength=classes + 1)[1:]
    on_test = _present(labels, blocks == 1, classes)
    # A class that is not on both sides draws no training pixels, whose guard would only cost test pixels.
    train = _draw(labels, np.where((on_train >= counts) & on_test, counts, 0), seed, blocks == 0)
    far = (blocks == 1) & (labels > 0) & guard(train, radius)
    present = _present(labels, train, classes) & _present(labels, far, classes)
    return Split(train, far & np.concatenate(([False], present))[labels], present, blocks)


def _disjoint(labels: np.ndarray, classes: int, split: SplitConfig, seed: int, patch_size: int, source: str) -> Split:
    """Return the assignment with the most classes trained and, behind the guard, scored (labels only)."""
    counts = training_counts(labels, classes, split, source)
    best = None
    for both, blocks in _assignments(labels, counts, split, seed):
        if best is not None and both <= best.classes.sum():
            break  # the guard can only take classes away
        candidate = _guarded(labels, counts, blocks, seed, (patch_size - 1) // 2)
        if best is None or candidate.classes.sum() > best.classes.sum():
            best = candidate
    if best.classes.sum() < 2:
        raise UserError(
            f"{source}: with blocks of {split.block} pixels and patches of {patch_size} fewer than two "
            "classes have both training and scored pixels; set a smaller data.split.block or patch_size, "
            "or a random split"
        )
    return best


def _official(train_map: np.ndarray, test_map: np.ndarray, classes: int, source: str) -> Split:
    train, test = train_map > 0, (test_map > 0) & (train_map == 0)
    trained, tested = _present(train_map, train, classes), _present(test_map, test, classes)
    lacking = np.flatnonzero(tested & ~trained) + 1
    if len(lacking):
        raise UserError(
            f"{source}: the official training map has no pixel of class {lacking[0]}, which the test map "
            "has; use the pair of maps that belongs together, or another data.split.kind"
        )
    return Split(train, test, trained & tested)


def make_split(
    labels: np.ndarray, classes: int, split: SplitConfig, seed: int, patch_size: int, source: str, maps=None
) -> Split:
    """Return the split of labels (H, W), integers with 0 = unlabelled, for a seed.

    ``split`` has kind (percent | count | official | published | disjoint), amount (percent, or pixels per class),
    minimum, block (pixels) and assignments; a disjoint split takes ``amount`` as percent of the whole class.
    ``maps`` is the official or published pair (train, test) of (H, W) maps. ``source`` names the label file in errors.
    Raises UserError for an even patch size, an unknown kind and classes without training pixels.
    """
    if patch_size < 1 or patch_size % 2 == 0:
        raise UserError(
            f"patch_size is {patch_size}: set an odd one, such as {max(patch_size, 0) + 1}, so "
            f"that every patch of {source} has a centre pixel"
        )
    if split.kind == "disjoint":
        return _disjoint(labels, classes, split, seed, patch_size, source)
    if split.kind in ("official", "published"):
        if maps is None:
            raise UserError(f"{source}: no official training and test maps are given; set another data.split.kind")
        return _official(*maps, classes, source)
    if split.kind not in ("percent", "count"):
        kinds = "percent, count, official, published or disjoint"
        raise UserError(f"{source}: unknown data.split.kind {split.kind!r}; set {kinds}")
    train = _draw(labels, training_counts(labels, classes, split, source), seed, labels > 0)
    return Split(train, (labels > 0) & ~train, np.ones(classes, bool))
