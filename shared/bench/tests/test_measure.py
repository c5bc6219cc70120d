"""What the benchmarks measure with."""

import sys

import pytest
import torch

from shared.bench.measure import interleaved, peak_bytes

MEGABYTES = 2**20


def allocating(megabytes: int):
    """Return a call that fills so much memory and gives it back."""
    # Nothing but filled: a sum of bytes would be made over int64, eight times as large.
    return lambda: torch.ones(megabytes * MEGABYTES, dtype=torch.uint8).numel()


def test_calls_are_made_in_turn_and_the_first_round_is_not_counted(monkeypatch):
    made = []
    clock = iter([0, 0, 0, 1, 0, 2, 0, 5, 0, 4])  # of the first round the beginnings alone
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    seconds = interleaved({name: lambda n=name: made.append(n) for name in "ab"}, 2)
    assert made == list("ababab")
    assert seconds == {"a": 3.0, "b": 3.0}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux says of a process")
def test_the_peak_is_that_of_the_call_even_below_a_large_parent():
    large = torch.ones(600 * MEGABYTES, dtype=torch.uint8)
    assert 180 * MEGABYTES < peak_bytes(allocating, 200) < 230 * MEGABYTES
    assert len(large) == 600 * MEGABYTES
