"""The C++ scan of a grid by itself: every set of vector instructions, thread counts, its time against the loop's."""

import statistics
import time

import pytest
import torch

from v2m.kernels import build
from v2m.kernels.scan2d import composition, cpu, reference, scan2d
from v2m.tests.golden_files import relative_error
from v2m.tests.test_scan2d import ALL, assert_same, judge, make, run

# Relative L2 error against the definition in float64 on the same inputs. float32: what the kernel promises. float64:
# the order of sums.
ERROR = {torch.float32: 1e-6, torch.float64: 1e-12}
# A state that remembers a thousand steps multiplies a bias of the decay by a thousand; unbiased rounding grows with
# the root.
SLOW_DECAY = 2e-6
# Times the composition of ordinary operators (copies, one loop a direction), forward and forward + backward, both
# passes of a mixer together, on AVX-512; AVX2 has half. Tests ask for half of these, so that a busy machine does not
# fail them.
SPEED = {14: (12, 18), 28: (20, 30), 56: (20, 30)}
SHARE = {"avx512": 0.5, "avx2": 0.25}

LEVELS = build.supported() if not cpu.unavailable() else []
pytestmark = pytest.mark.skipif(not LEVELS, reason="no C++ compiler is here")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(LEVELS)])
def level(request, monkeypatch):
    """Each set of vector instructions of this machine; those that it would not choose compile in a slow test."""
    monkeypatch.setenv("VISREP_CPU_LEVEL", request.param)
    return request.param


@pytest.fixture
def threads():
    """Return the setter of torch's number of threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("state", [1, 4, 7, 16])
def test_every_width_and_state_matches_the_definition(level, dtype, channels, state):
    arguments = make(3, 34, dtype, channels=channels, state=state)
    assert_same(run(arguments, backend="cpu"), judge(arguments), ERROR[dtype])


def test_the_number_of_threads_changes_no_bit(level, threads):
    arguments = make(14, 33, torch.float32, channels=70, state=5)
    threads(1)
    alone = run(arguments, backend="cpu")
    threads(4)
    together = run(arguments, backend="cpu")
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_a_state_that_hardly_decays_does_not_drift(level):
    arguments = make(1, 2000, torch.float32, kinds=(None, None), groups=1, channels=16, state=1)
    arguments["A"] = torch.full((1, 16, 1), -1e-4)
    y = run(arguments, ("right",), "cpu")["y"]
    assert relative_error(y, judge(arguments, ("right",))["y"]) < SLOW_DECAY


def test_columns_are_scanned_where_they_lie(monkeypatch):
    """The kernel is given views of the very memory of the arguments, rows and columns alike."""
    arguments = make(5, 8, torch.float32)
    given = []
    run_call = cpu._Call.run

    def spy(call, direction, **results):
        given.append((call, results))
        return run_call(call, direction, **results)

    monkeypatch.setattr(cpu._Call, "run", spy)
    y, _ = cpu.forward(*arguments.values(), True, ALL, False)
    assert len(given) == 2  # one call an axis
    for call, results in given:
        for name in ("u", "delta", "B", "C"):
            assert call.inputs[name].untyped_storage().data_ptr() == arguments[name].untyped_storage().data_ptr()
        assert results["y"].untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _ratios(side: int) -> tuple[float, float]:
    """Return by how many times the composition's time is that of the kernel, from medians of alternating runs."""
    passes = [
        (make(side, side, torch.float32, kinds, channels=384, state=16), directions)
        for kinds, directions in ((("variable", None), ("right", "left") * 2), ((None, "variable"), ("down", "up") * 2))
    ]

    def forward(scan):
        with torch.no_grad():
            for arguments, directions in passes:
                scan(*arguments.values(), True, directions)

    def both(scan):
        for arguments, directions in passes:
            leaves = [None if t is None else t.detach().requires_grad_() for t in arguments.values()]
            y = scan(*leaves, True, directions)
            torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y))

    def kernel(u, delta, A, B, C, bias, softplus, directions):
        options = {"directions": directions, "delta_softplus": softplus, "backend": "cpu"}
        return scan2d(u, delta, A, B, C, delta_bias=bias, **options)

    times: dict = {}
    for turn in range(4):
        for work in (forward, both):
            for scan in (composition.scan, kernel):
                for _ in range(1 if scan is composition.scan else 3):
                    start = time.perf_counter()
                    work(scan)
                    if turn:
                        times.setdefault((work, scan), []).append(time.perf_counter() - start)
    middle = {key: statistics.median(seconds) for key, seconds in times.items()}
    return tuple(middle[work, composition.scan] / middle[work, kernel] for work in (forward, both))


@pytest.mark.slow
@pytest.mark.parametrize("side", SPEED)
def test_the_kernel_is_faster_than_the_composition_by_half_of_what_is_promised(side, threads):
    if LEVELS[0] == "plain":
        pytest.skip("without AVX2 the ratio is printed by the benchmark only")
    threads(2)
    for _ in range(2):
        ratios = _ratios(side)
        bars = [bar * SHARE[LEVELS[0]] for bar in SPEED[side]]
        if all(ratio >= bar for ratio, bar in zip(ratios, bars, strict=True)):
            return
    raise AssertionError(f"{ratios[0]:.0f} and {ratios[1]:.0f} times as fast, wanted {bars}")


def test_types_that_the_kernel_does_not_take_are_refused():
    arguments = make(2, 3, torch.float32)
    arguments["u"] = arguments["u"].double()
    with pytest.raises(ValueError, match="does not go with A"):
        cpu.forward(*arguments.values(), True, ALL, False)


def test_reference_and_kernel_agree_on_what_axes_are():
    assert reference.by_axis(("up", "right", "down")) == [(-1, [1], [False]), (-2, [0, 2], [True, False])]
