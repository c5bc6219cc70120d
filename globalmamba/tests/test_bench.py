"""The benchmark's tables, and what `chunked` promises in time and memory."""

import pytest
import torch

from globalmamba.tools import bench

# Times the plain loop's speed, forward and forward + backward, by length; half of it where others run too.
SPEED = {196: (2.5, 2.5), 784: (3.5, 3.0)}
MEMORY = 20.0  # tensors of (batch, width, L) that training adds, outputs and gradients among them


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("length", SPEED)
def test_chunked_is_faster_than_the_plain_loop_by_half_of_what_is_promised(length, two_threads):
    for _ in range(2):
        times = bench.scan_times(length, 16, 3, ("reference", "chunked"))
        ratios = [times[what]["reference"] / times[what]["chunked"] for what in bench.CALLS]
        if all(ratio >= bar / 2 for ratio, bar in zip(ratios, SPEED[length], strict=True)):
            return
    raise AssertionError(f"{ratios} times as fast, wanted half of {SPEED[length]}")


@pytest.mark.slow
def test_chunked_takes_at_most_twenty_tensors_in_training():
    tensors = bench.extra_tensors("chunked", 784, 16)
    assert tensors == "–" or float(tensors) <= MEMORY


def test_the_table_names_every_backend_and_says_why_one_was_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "BATCH", 1)
    monkeypatch.setattr(bench, "WIDTH", 8)
    monkeypatch.setattr(bench, "extra_tensors", lambda *arguments: "1.0")
    table = bench.scan_table([4, 8], 1)
    names = list(table.columns[2].cells)
    assert set(names) == set(bench.BACKENDS) and len(names) == 3 * len(set(names) - {"triton", "mamba_ssm"}) + 2
    assert all(list(table.columns[3].cells)[names.index(name)] for name in ("triton", "mamba_ssm"))
