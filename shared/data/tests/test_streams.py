"""Every kind of draw has a number of its own, but for the pairs that had shared one before it was measured with."""

from collections import Counter

import pytest

from shared.data.keyed import STREAMS, stream

SHARED_NUMBERS = {21, 22, 31, 32}  # of the pairs that streams.yml explains


def test_no_further_streams_share_a_number():
    assert {number for number, count in Counter(STREAMS.values()).items() if count > 1} == SHARED_NUMBERS


def test_streams_that_were_measured_with_keep_their_numbers():
    some = {"pdml.split.blocks": 2, "pdml.resample.noise": 13, "pdml.pixel": 22, "pdml.synthetic.noise": 26}
    some |= {"subset": 31, "classification.dropping": 32, "augment.mix": 38, "idml.within": 40}
    some |= {"idml.mixing": 47, "opera.dropping": 60, "opera.tuning.dropping": 62, "opera.hiding": 63}
    assert {name: stream(name) for name in some} == some


def test_a_name_that_is_not_registered_is_an_error():
    with pytest.raises(KeyError):
        stream("subsets")
