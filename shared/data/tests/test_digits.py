"""The embedded digits and their keyed split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data.images import load_digits, split_by_index
from shared.data.manifest import load_manifest


def test_digits_have_the_shape_range_and_counts_of_their_manifest():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8) and images.dtype == np.float32 and labels.dtype == np.int64
    assert images.min() == 0 and images.max() == 1
    assert np.bincount(labels).tolist() == load_manifest("digits").counts["digits"]


def test_chosen_classes_keep_their_numbers_and_images():
    images, labels = load_digits()
    some, their_labels = load_digits(classes=[7, 2])
    assert set(their_labels.tolist()) == {2, 7}
    assert np.array_equal(some, images[np.isin(labels, [2, 7])])


@pytest.mark.parametrize("classes", [[10], [-1, 3], []])
def test_a_class_that_is_no_digit_is_refused(classes):
    with pytest.raises(ValueError, match="classes 0 to 9"):
        load_digits(classes)


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=20).map(lambda half: np.array(half * 2)),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_split_is_a_stratified_partition(labels, fraction, seed):
    train, test = split_by_index(labels, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    for label in np.unique(labels):
        size, taken = (labels == label).sum(), (labels[train] == label).sum()
        assert 1 <= taken < size
        assert abs(taken - fraction * size) < 1  # rounding, or the one image that a side must keep


def test_split_never_changes_between_versions_and_machines():
    train, test = split_by_index(load_digits()[1], 0.8, seed=0)
    assert (len(train), train[:5].tolist(), test[:5].tolist()) == (1438, [0, 1, 2, 3, 6], [4, 5, 10, 14, 16])


def test_another_seed_gives_another_split():
    labels = load_digits()[1]
    assert not np.array_equal(split_by_index(labels, 0.5, 0)[0], split_by_index(labels, 0.5, 1)[0])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_index(np.array([0, 0]), fraction, 0)


def test_a_class_with_one_image_is_refused_by_name():
    with pytest.raises(ValueError, match="class 5 has one image"):
        split_by_index(np.array([1, 1, 5]), 0.5, 0)
