"""Every kind of draw has a number of its own, but for the pairs that had shared one before it was measured with."""

from collections import Counter

import pytest

from shared.data.streams import SHARED_NUMBERS, STREAMS, stream


def test_no_further_streams_share_a_number():
    assert {number for number, count in Counter(STREAMS.values()).items() if count > 1} == SHARED_NUMBERS


def test_no_stream_was_put_before_another_and_so_changed_its_number():
    last = {"pdml.split.blocks": 2, "pdml.resample.noise": 13, "pdml.pixel": 22, "pdml.synthetic.noise": 26}
    last |= {"subset": 31, "classification.dropping": 32, "augment.mix": 38, "sampler.within": 40}
    last |= {"idml.mixing": 47, "opera.dropping": 60, "opera.tuning.dropping": 62, "opera.hiding": 63}
    assert {name: stream(name) for name in last} == last


def test_a_name_that_is_not_registered_is_an_error():
    with pytest.raises(KeyError):
        stream("subsets")
