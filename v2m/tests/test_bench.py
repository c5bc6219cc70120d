"""The benchmark's tables, and that what is timed against each other computes the same."""

import pytest
import torch

from v2m.mixer import ReleasedMixer
from v2m.tools import bench
from v2m.tools.released_composition import released_composition

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums in another order
# Of the composition's speed, both passes, forward and forward + backward: as fast, less what a busy machine takes.
SPEED = {28: 0.8}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_released_composition_gives_what_the_released_mixer_gives():
    torch.manual_seed(0)
    mixer = ReleasedMixer(8, state_dim=4).double()
    grid = torch.randn(2, 5, 5, 8, dtype=torch.float64, requires_grad=True)
    y, expected = released_composition(mixer, grid), mixer(grid)
    torch.testing.assert_close(y, expected, **EXACT)
    leaves, dy = [grid, *mixer.parameters()], torch.randn_like(y)
    for got, want in zip(*(torch.autograd.grad(out, leaves, dy) for out in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)  # A's logarithm passes through float32


def test_every_timed_scan_gives_the_same(monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 8)
    expected = bench.forward_call("reference", 3, 5)()
    for backend in bench.BACKENDS:
        if bench.runs_here(backend):
            for got, want in zip(bench.forward_call(backend, 3, 5)(), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_the_timed_forms_of_the_recurrence_give_the_same(train, monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 8)
    results = (bench.recurrence_call(backend, 3, 5, train)() for backend in bench.RECURRENCE)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("side", SPEED)
def test_chunked_is_as_fast_as_the_composition(side, two_threads):
    for _ in range(2):
        times = bench.scan_times(side, side, 3, ("composition", "chunked"))
        ratios = [times[what]["composition"] / times[what]["chunked"] for what in bench.CALLS]
        if min(ratios) >= SPEED[side]:
            return
    raise AssertionError(f"{ratios} times as fast, wanted {SPEED[side]}")


def test_the_tables_name_every_backend_and_mixer(monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 16)
    for name in ("extra_tensors", "mixer_peak"):
        monkeypatch.setattr(bench, name, lambda *arguments: "1.0")
    table = bench.scan_table([(2, 3), (4, 4)], 1)
    names = list(table.columns[1].cells)
    assert set(names) == set(bench.BACKENDS)
    assert all(list(table.columns[2].cells)[names.index(name)] for name in ("triton", "mamba_ssm"))
    assert list(bench.recurrence_table(2, 3, 1).columns[0].cells) == list(bench.RECURRENCE)
    assert list(bench.mixer_table(2, 1, 1).columns[0].cells) == list(bench.MIXERS)
