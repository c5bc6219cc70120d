"""Every kind of draw has a number of its own, but for the pairs that had shared one before it was measured with."""

from collections import Counter

import pytest

from shared.data.streams import SHARED_NUMBERS, STREAMS, stream


def test_no_further_streams_share_a_number():
    assert {number for number, count in Counter(STREAMS.values()).items() if count > 1} == SHARED_NUMBERS


def test_a_name_that_is_not_registered_is_an_error():
    with pytest.raises(KeyError):
        stream("subsets")
