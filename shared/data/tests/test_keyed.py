"""Keyed randomness: the same numbers everywhere, and good enough numbers."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from shared.data.keyed import keyed_bits, keyed_permutation, keyed_places, keyed_uniform

# The keys below are fixed, so a test gives one p-value for ever; a true generator fails 1 key in 1000.
LOWEST_P_VALUE = 1e-3
# Four standard errors of a correlation of 100,000 independent pairs.
HIGHEST_CORRELATION = 4 / np.sqrt(100_000)
NATURAL = st.integers(0, 2**64 - 1)


def test_bits_never_change_between_versions_and_machines():
    pinned = [0xCAB9404F674E417A, 0xCEEB91EA88B1F274, 0x114AA900997DFC6E]
    assert keyed_bits(7, 3, np.arange(3)).tolist() == pinned
    assert keyed_bits(2**63) == 0x481EC0A212A9F3DB


def test_key_zero_gives_the_first_number_of_published_splitmix64():
    assert keyed_bits(0) == 0xE220A8397B1DCDAF


def test_uniform_and_permutation_never_change_between_versions_and_machines():
    assert keyed_uniform(1, 2).item() == 0.9786297253172748
    assert keyed_permutation(8, 42).tolist() == [3, 2, 1, 6, 0, 4, 7, 5]


@pytest.mark.parametrize("key", [(0,), (1,), (2, 5)])
def test_uniform_passes_chi_square_and_stays_below_one(key):
    numbers = keyed_uniform(*key, np.arange(100_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert scipy.stats.chisquare(counts).pvalue > LOWEST_P_VALUE


def test_every_bit_is_set_half_of_the_time():
    bits = keyed_bits(3, np.arange(100_000))
    for place in range(64):
        ones = int(((bits >> np.uint64(place)) & np.uint64(1)).sum())
        # 64 looks at one fixed sample, so the level is shared out among them
        assert scipy.stats.binomtest(ones, 100_000).pvalue > LOWEST_P_VALUE / 64


def test_neighbouring_keys_are_uncorrelated():
    index = np.arange(100_000)
    keys = [(0, index), (1, index), (index, 0), (0, index + 1)]
    streams = [keyed_uniform(*key) for key in keys]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    # (index, 0) and (0, index) are other names, so other numbers
    assert np.abs(correlations).max() < HIGHEST_CORRELATION


@given(length=st.integers(0, 300), seed=NATURAL, epoch=NATURAL)
def test_permutation_holds_every_index_once(length, seed, epoch):
    permutation = keyed_permutation(length, seed, epoch)
    assert permutation.dtype == np.int64
    assert np.array_equal(np.sort(permutation), np.arange(length))


@given(labels=st.lists(st.integers(-2, 2), max_size=30), seed=NATURAL)
def test_places_within_a_label_are_those_of_its_members_sorted_by_their_bits(labels, seed):
    labels, bits = np.array(labels, np.int64), keyed_bits(seed, np.arange(len(labels)))
    places = keyed_places(labels, seed)
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label)
        assert np.array_equal(np.argsort(places[members]), np.argsort(bits[members]))
        assert np.array_equal(np.sort(places[members]), np.arange(len(members)))


def test_first_place_of_a_permutation_is_uniform():
    first = [keyed_permutation(10, 6, epoch)[0] for epoch in range(5_000)]
    assert scipy.stats.chisquare(np.bincount(first, minlength=10)).pvalue > LOWEST_P_VALUE


@given(seed=NATURAL, rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_an_array_of_keys_gives_what_each_key_gives_alone(seed, rows, columns):
    bits = keyed_bits(seed, np.arange(rows)[:, None], np.arange(columns))
    assert bits.shape == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            assert bits[row, column] == keyed_bits(seed, row, column)


def test_integer_type_of_a_key_does_not_matter():
    for dtype in (np.uint8, np.int16, np.int32, np.uint64):
        assert np.array_equal(keyed_bits(1, np.arange(100, dtype=dtype)), keyed_bits(1, np.arange(100)))


def test_longer_and_reordered_keys_are_other_keys():
    assert len({int(keyed_bits(*key)) for key in [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (1,)]}) == 6


@pytest.mark.parametrize("part", [-1, np.array([0, -2]), 1.0, "seed"])
def test_a_key_that_is_no_natural_number_is_refused(part):
    with pytest.raises(ValueError, match="integers, none of them negative"):
        keyed_bits(0, part)
