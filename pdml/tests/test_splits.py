"""Splits: how many pixels train, that blocks are disjoint, and that no scored pixel sees a training pixel."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdml.splits import block_index, guard, make_split, training_counts
from shared.data.keyed import keyed_bits
from shared.errors import UserError

CLASSES = 4


def options(kind="percent", amount=5, **changes):
    return SimpleNamespace(**{"kind": kind, "amount": amount, "minimum": 3, "block": 20, "assignments": 200, **changes})


def label_map(height=61, width=44, cell=9, seed=0):
    """Return patches of classes, a fifth of the pixels unlabelled."""
    row, column = np.ix_(np.arange(height), np.arange(width))
    labels = keyed_bits(90, seed, row // cell, column // cell) % np.uint64(CLASSES) + np.uint64(1)
    return np.where(keyed_bits(91, seed, row, column) % np.uint64(5) == 0, 0, labels).astype(np.int16)


def split_of(labels, seed=0, patch_size=5, **changes):
    return make_split(labels, CLASSES, options(**changes), seed, patch_size, "labels.mat")


def counts_of(labels, mask):
    return np.bincount(labels[mask], minlength=CLASSES + 1)[1:]


@pytest.mark.parametrize("patch_size", [1, 3, 5, 9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_patch_that_takes_part_in_a_test_decision_contains_a_training_pixel(patch_size, seed):
    labels = label_map(seed=seed)
    split = split_of(labels, seed, patch_size, kind="disjoint")
    radius = patch_size // 2
    # Pixel numbers, mirrored at the border as the patches are: a patch holds the numbers in its window.
    numbers = np.pad(np.arange(labels.size).reshape(labels.shape), radius, mode="reflect")
    assert split.test.sum() > 100 and split.train.sum() > 20
    for row, column in np.argwhere(split.test):
        for i in range(max(row - radius, 0), min(row + radius + 1, labels.shape[0])):  # all covering patches
            for j in range(max(column - radius, 0), min(column + radius + 1, labels.shape[1])):
                patch = numbers[i : i + patch_size, j : j + patch_size]
                assert not split.train.flat[patch].any()


@pytest.mark.parametrize("radius", [0, 1, 4])
def test_guard_is_as_wide_as_two_overlapping_patches_and_no_wider(radius):
    train = np.zeros((41, 41), bool)
    train[20, 20] = True
    row, column = np.ix_(np.arange(41), np.arange(41))
    distance = np.maximum(abs(row - 20), abs(column - 20))
    assert np.array_equal(guard(train, radius), distance > 2 * radius)


@given(st.integers(20, 150), st.integers(20, 150), st.integers(8, 30))
@settings(max_examples=40, deadline=None)
def test_every_block_is_a_rectangle_with_sides_of_at_least_the_asked_pixels(height, width, block):
    index = block_index(height, width, block)
    for number in range(index.max() + 1):
        own = index == number
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        assert own[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert len(rows) >= min(block, height) and len(columns) >= min(block, width)


def test_disjoint_training_and_scored_pixels_lie_in_blocks_of_their_own_side():
    labels = label_map()
    split = split_of(labels, kind="disjoint")
    assert (split.blocks[split.train] == 0).all() and (split.blocks[split.test] == 1).all()
    index = block_index(*labels.shape, 20)
    assert all(len(np.unique(split.blocks[index == number])) == 1 for number in range(index.max() + 1))


def test_disjoint_split_trains_on_as_many_pixels_per_class_as_the_percent_split():
    labels = label_map()
    disjoint, percent = (split_of(labels, kind=kind) for kind in ("disjoint", "percent"))
    assert disjoint.classes.all()
    assert np.array_equal(counts_of(labels, disjoint.train), counts_of(labels, percent.train))


def test_chosen_assignment_has_the_most_classes_with_training_and_scored_pixels():
    labels = label_map(cell=17, seed=3)  # large patches of classes, so that many assignments lose one
    labels[:6, :6] = np.where(labels[:6, :6] > 0, CLASSES, 0)
    chosen = split_of(labels, kind="disjoint")
    counts, index = training_counts(labels, CLASSES, options("disjoint"), ""), block_index(*labels.shape, 20)
    most, fewest = 0, CLASSES
    for number in range(200):
        side = (keyed_bits(2, 0, number, np.arange(index.max() + 1)) & np.uint64(1)).astype(int)[index]
        classes = 0
        for c in range(1, CLASSES + 1):
            classes += (labels[side == 0] == c).sum() >= counts[c - 1] and (labels[side == 1] == c).any()
        most, fewest = max(most, classes), min(fewest, classes)
    assert fewest < most  # otherwise there would be nothing to choose
    assert chosen.classes.sum() == most


def test_no_other_assignment_keeps_more_classes_behind_the_guard():
    labels = label_map(height=80, width=80, cell=5, seed=1)
    labels[labels > 2] = 0
    for row, column, number in ((1, 1, 3), (41, 38, 3), (18, 61, 4), (62, 18, 4)):  # small fields near borders
        labels[row : row + 4, column : column + 4] = number
    chosen = split_of(labels, kind="disjoint", patch_size=9, seed=2)
    kept = []
    for number in range(60):
        one = split_of(labels, kind="disjoint", patch_size=9, seed=2, assignments=number + 1)
        kept.append(int(one.classes.sum()))
    assert kept == sorted(kept) and kept[0] < kept[-1] <= chosen.classes.sum()


def test_class_missing_on_a_side_is_neither_scored_nor_an_error():
    labels = label_map()
    labels[labels == CLASSES] = 0
    labels[2:4, 2:6] = CLASSES  # eight pixels in one block can be on one side only
    split = split_of(labels, kind="disjoint")
    assert split.classes.tolist() == [True, True, True, False]
    assert not (labels[split.test] == CLASSES).any()


@given(st.integers(0, 1000), st.sampled_from([0.5, 2, 5, 33.3]))
@settings(max_examples=20, deadline=None)
def test_percent_split_draws_the_rounded_up_share_of_every_class_and_scores_the_rest(seed, amount):
    labels = label_map(seed=seed % 7)
    split = split_of(labels, seed, amount=amount)
    sizes = counts_of(labels, labels > 0)
    expected = np.maximum(-np.floor(-sizes * (amount / 100) + 1e-9), 3)
    assert np.array_equal(counts_of(labels, split.train), expected)
    assert np.array_equal(split.test, (labels > 0) & ~split.train) and split.blocks is None and split.classes.all()


def test_an_exact_percentage_is_not_rounded_up_by_floating_point():
    labels = np.repeat(np.arange(1, CLASSES + 1), 3000).reshape(100, -1)
    assert training_counts(labels, CLASSES, options(amount=0.7, minimum=1), "").tolist() == [21] * CLASSES


def test_count_split_draws_the_same_number_from_every_class():
    labels = label_map()
    split = split_of(labels, kind="count", amount=7)
    assert counts_of(labels, split.train).tolist() == [7] * CLASSES


def test_official_split_is_the_two_maps():
    labels = label_map()
    first = np.where(np.arange(labels.size).reshape(labels.shape) % 3 == 0, labels, 0)
    split = make_split(labels, CLASSES, options("official"), 0, 5, "labels.mat", (first, labels - first))
    assert np.array_equal(split.train, first > 0) and np.array_equal(split.test, (labels - first) > 0)


@pytest.mark.parametrize(
    "kind, digest", [("percent", "dcf67342405d"), ("count", "f59d45ffb848"), ("disjoint", "b4327f028f6b")]
)
def test_a_seed_names_the_same_split_on_every_machine(kind, digest):
    split = split_of(label_map(), seed=7, kind=kind)
    assert hashlib.sha256(np.packbits([split.train, split.test]).tobytes()).hexdigest()[:12] == digest


@pytest.mark.parametrize("kind", ["percent", "count", "disjoint"])
def test_seeds_draw_different_training_pixels(kind):
    first, second = (split_of(label_map(), seed, kind=kind) for seed in (0, 1))
    assert (first.train & second.train).sum() < 0.5 * first.train.sum()


@pytest.mark.parametrize("kind, amount", [("percent", 5), ("count", 5)])
def test_class_with_too_few_labelled_pixels_is_named_with_file_and_remedy(kind, amount):
    labels = label_map()
    labels[labels == 3] = 0
    labels[0, :3] = 3
    with pytest.raises(UserError, match=r"labels\.mat: class 3 has 3 labelled pixels.*lower data\.split\.amount"):
        split_of(labels, kind=kind, amount=amount)


def test_official_training_map_without_a_class_of_the_test_map_is_refused():
    labels = label_map()
    train, test = np.where(labels == 1, labels, 0), np.where(labels != 1, labels, 0)
    with pytest.raises(UserError, match=r"labels\.mat: the official training map has no pixel of class 2"):
        make_split(labels, CLASSES, options("official"), 0, 5, "labels.mat", (train, test))


def test_official_split_without_maps_is_refused():
    with pytest.raises(UserError, match="no official training and test maps are given"):
        split_of(label_map(), kind="official")


@pytest.mark.parametrize("patch_size", [0, 8])
def test_even_patch_size_is_refused(patch_size):
    with pytest.raises(UserError, match=f"patch_size is {patch_size}: set an odd one.*labels.mat"):
        split_of(label_map(), patch_size=patch_size)


def test_patch_too_wide_for_the_blocks_is_refused():
    with pytest.raises(UserError, match="fewer than two classes"):
        split_of(label_map(), patch_size=61, kind="disjoint")
