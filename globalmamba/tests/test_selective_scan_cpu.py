"""The C++ scan by itself: every set of vector instructions, memory layout, thread count; its build; its bars."""

import ctypes
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from globalmamba.kernels import build
from globalmamba.kernels.selective_scan import cpu, reference
from globalmamba.tests.golden_files import relative_error

# Relative L2 error against the definition in float64 on the same inputs. float32: what the kernel promises. Half
# types: results are rounded once, half a unit in the last place is 2^-9 and 2^-12. float64: the order of sums.
FORWARD = {torch.float32: 2e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float64: 1e-14}
GRADIENT = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float64: 1e-13}
# A state that remembers a thousand steps multiplies a bias of the decay by a thousand; unbiased rounding grows
# with the root. Measured 3e-7; a bias of a quarter unit in the last place gives 1e-5.
SLOW_DECAY = 2e-6
# Times the plain loop, forward and forward + backward, on AVX-512; AVX2 has half. Tests ask for half of these, so
# that a busy machine does not fail them.
SPEED = {(784, 16): (40, 45), (196, 16): (30, 30), (3136, 16): (45, 45), (784, 1): (10, 10)}
MEMORY = 4.0  # tensors of (batch, width, L) beside inputs, output and its gradient

LEVELS = build.supported() if not cpu.unavailable() else []
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
ROOT = Path(__file__).parents[2]

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


@pytest.fixture
def poisoned():
    """Fresh memory, scratch included, holds NaN, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def make(width=24, state=16, length=63, batch=2, groups=(1, 1), dtype=torch.float32, layout="BDL", options=True):
    """Return u, delta, A, B, C, D, z, delta_bias; no groups is a fixed matrix."""
    draws = torch.Generator().manual_seed(width + length)
    kept = torch.promote_types(dtype, torch.float32)

    def draw(*size, into=dtype):
        return torch.randn(*size, generator=draws, dtype=torch.float64).to(into)

    def in_time():
        return draw(batch, length, width).mT if layout == "BLD" else draw(batch, width, length)

    u, delta, z = in_time(), in_time(), in_time()
    A = -torch.exp(draw(width, state, into=kept) / 2)
    B, C = (draw(batch, g, state, length) if g else draw(width, state) for g in groups)
    D, bias = draw(width, into=kept), draw(width, into=kept) - 1
    return (u, delta, A, B, C, D, z, bias) if options else (u, delta, A, B, C, None, None, None)


def gradients_of(u) -> torch.Tensor:
    return torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(u.dtype)


def run(arguments, dy=None, softplus=True, reverse=(False,), dlast=None) -> dict[str, torch.Tensor]:
    """Return the kernel's y, last state and gradients by name."""
    y, last, saved = cpu.forward(*arguments, softplus, reverse, True)
    dy = gradients_of(arguments[0]) if dy is None else dy
    gradients = cpu.backward(dy, dlast, *arguments, saved, softplus, reverse)
    return {"y": y, "last": last} | {f"d{n}": g for n, g in zip(NAMES, gradients, strict=True) if g is not None}


def judge(arguments, dy=None, softplus=True, reverse=(False,), dlast=None) -> dict[str, torch.Tensor]:
    """Return the same by the definition and autograd, in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in arguments]
    y, last = reference.scan(*leaves, softplus, reverse)
    dy = gradients_of(arguments[0]) if dy is None else dy
    loss = (y * dy).sum() + (0 if dlast is None else (last * dlast).sum())
    given = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    gradients = torch.autograd.grad(loss, list(given.values()))
    return {"y": y, "last": last} | {f"d{n}": g for n, g in zip(given, gradients, strict=True)}


def assert_right(arguments, **options) -> None:
    dtype = arguments[0].dtype
    got, want = run(arguments, **options), judge(arguments, **options)
    assert got.keys() == want.keys()
    like = dict(zip((f"d{n}" for n in NAMES), arguments, strict=True)) | {"y": arguments[0], "last": arguments[2]}
    for name, right in want.items():
        assert got[name].dtype == like[name].dtype, name
        error = relative_error(got[name], right.detach())
        assert error <= (FORWARD if name in ("y", "last") else GRADIENT)[dtype], (name, error)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 197])
@pytest.mark.parametrize("layout", ["BDL", "BLD"])
def test_tile_borders_and_both_layouts_are_right_and_nothing_unwritten_is_read(level, layout, length, poisoned):
    assert_right(make(length=length, layout=layout))


@pytest.mark.parametrize("width", [1, 3, 16, 17, 40, 130])
@pytest.mark.parametrize("layout", ["BDL", "BLD"])
def test_widths_that_are_no_multiple_of_a_vector_are_right(level, layout, width, poisoned):
    assert_right(make(width=width, length=33, state=4, layout=layout))


@pytest.mark.parametrize("state", [1, 3, 16, 17, 64])
@pytest.mark.parametrize("groups", [(1, 1), (0, 0), (0, 1), (1, 0)])
def test_any_number_of_states_with_fixed_and_variable_matrices_is_right(level, groups, state, poisoned):
    assert_right(make(state=state, groups=groups, length=40))


@pytest.mark.parametrize("groups", [(4, 4), (2, 4), (0, 2), (4, 0), (24, 24)])
@pytest.mark.parametrize("reverse", [(True,), (True, False), (False, True)])
def test_directions_and_groups_of_channels_are_right(level, groups, reverse, poisoned):
    assert_right(make(groups=groups, state=5, length=50), reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["BDL", "BLD"])
def test_half_and_double_precision_are_right(level, layout, dtype, poisoned):
    assert_right(make(dtype=dtype, layout=layout, width=40, state=6, length=70, groups=(2, 0)), reverse=(True, False))


@pytest.mark.parametrize("softplus", [True, False])
def test_the_gradient_of_the_last_state_and_absent_arguments_are_right(level, softplus):
    u, delta, *rest = make(options=False)
    dlast = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(2))
    assert_right((u, delta if softplus else delta.abs(), *rest), softplus=softplus, dlast=dlast)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 63), (1, 24, 1)])
def test_an_expanded_gradient_is_right(level, shape):
    arguments = make()
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(3)).expand(arguments[0].shape)
    assert_right(arguments, dy=dy)


def test_inputs_cut_out_of_larger_tensors_are_right(level):
    u, delta, A, B, C, D, z, bias = make()
    cut = [torch.stack([t, t * 0 + 9], -1)[..., 0] for t in (u, delta, z)]
    B, C = (torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (B, C))
    A, D = torch.stack([A, A], 1)[:, 0], torch.stack([D, D], 1)[:, 0]
    assert_right((cut[0], cut[1], A, B, C, D, cut[2], bias))


def test_long_sums_keep_the_promised_accuracy(level):
    assert_right(make(width=48, length=784))


def test_slow_decays_have_no_bias(level):
    u, delta, A, B, C, *_ = make(state=4, length=2000, options=False)
    arguments = (u, torch.rand_like(delta) * 0.002, -torch.ones_like(A), B, C, None, None, None)
    got, want = run(arguments, softplus=False)["last"], judge(arguments, softplus=False)["last"]
    assert relative_error(got, want.detach()) <= SLOW_DECAY


def test_extreme_steps_give_zero_or_the_input_and_never_nan(level):
    u, delta, A, B, C, D, z, bias = make(length=40)
    delta[:, ::2] = 1e5  # everything before is forgotten
    delta[:, 1::2] = float("-inf")  # nothing happens
    z[:, 0], z[:, 1] = 1e4, -1e4
    arguments = (u, delta, A, B, C, D, z, bias)
    got = run(arguments)
    assert all(t.isfinite().all() for t in got.values())
    want = reference.scan(*(t.double() for t in arguments), True, (False,))[0]
    assert relative_error(got["y"], want) <= FORWARD[torch.float32]


def test_backward_is_bitwise_the_same_twice_and_with_any_threads(level, threads, monkeypatch):
    arguments = make(batch=3, width=200, length=100)
    results = []
    for count, pool in ((1, True), (1, True), (2, True), (3, True), (3, False)):
        threads(count)
        if not pool:
            monkeypatch.setattr(build, "parallel", lambda: None)
        results.append(run(arguments))
    for other in results[1:]:
        assert all(torch.equal(other[name], first) for name, first in results[0].items())


def test_torchs_own_openmp_runtime_is_found():
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("torch came without libgomp")
    assert build.parallel() == ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value


def _in_child(arguments, expected, queue) -> None:
    torch.set_num_threads(2)
    queue.put(torch.equal(cpu.forward(*arguments, True, (False,), False)[0], expected))


def test_a_forked_process_can_scan_after_its_parent_did(threads):
    threads(2)
    arguments = make(width=64)
    expected = cpu.forward(*arguments, True, (False,), False)[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(arguments, expected, queue))
    child.start()
    try:
        assert queue.get(timeout=60)
    finally:
        child.kill()
        child.join()


def test_types_that_do_not_go_together_are_refused():
    u, *rest = make()
    with pytest.raises(ValueError, match="u is torch.float64"):
        cpu.forward(u.double(), *rest, True, (False,), False)


# ---- the build -----------------------------------------------------------------------------------------------


def test_steps_between_saved_states_are_those_of_the_library():
    assert build.load(cpu.SOURCE).visrep_scan_steps() == cpu.STEPS


def test_without_a_compiler_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler is here" in cpu.unavailable()
    with pytest.raises(RuntimeError, match="install g\\+\\+"):
        cpu.forward(*make(), True, (False,), False)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    assert re.search("cannot compile .*cpu.cpp: x.cpp:1: error: no such thing", cpu.unavailable())
    assert not list((tmp_path / "visrep").iterdir())


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "visrep").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert re.search("cannot be written to .*visrep.*set XDG_CACHE_HOME", cpu.unavailable())


def test_an_unknown_level_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("VISREP_CPU_LEVEL", "sse9")
    assert "VISREP_CPU_LEVEL=sse9 is not one of this machine's" in cpu.unavailable()


@pytest.mark.slow
def test_two_processes_that_build_at_once_leave_one_whole_library(tmp_path):
    code = "from globalmamba.kernels.selective_scan import cpu; raise SystemExit(cpu.unavailable() or 0)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    (library,) = (tmp_path / "visrep").iterdir()
    assert library.suffix == ".so"


# ---- the bars ------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from globalmamba.kernels.selective_scan import cpu
from globalmamba.tests.test_selective_scan_cpu import make

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

torch.set_num_threads(2)
small = make(length=64)
cpu.backward(small[0], None, *small, cpu.forward(*small, True, (False,), True)[2], True, (False,))
arguments = make(batch=8, width=384, length=3136)
dy, y = torch.randn_like(arguments[0]), None
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
y, last, saved = cpu.forward(*arguments, True, (False,), True)
gradients = cpu.backward(dy, None, *arguments, saved, True, (False,))
print((resident("VmHWM") - before) / (dy.numel() * 4) - 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps no resettable peak")
def test_training_takes_at_most_four_tensors_beside_inputs_and_output():
    # 38 MB a tensor: beyond what the allocator keeps, so that freed memory is given back and a peak is a peak.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= MEMORY


def _ratios(length: int, state: int) -> tuple[float, float]:
    """Return by how many times the plain loop's time is that of the kernel, from medians of alternating runs."""
    arguments = make(batch=8, width=384, state=state, length=length)
    dy = gradients_of(arguments[0])
    leaves = [t.clone().requires_grad_() for t in arguments]

    def loop():
        with torch.no_grad():
            reference.scan(*arguments, True, (False,))

    def loop_both():
        torch.autograd.grad(reference.scan(*leaves, True, (False,))[0], leaves, dy)

    def kernel():
        cpu.forward(*arguments, True, (False,), False)

    def kernel_both():
        run(arguments, dy=dy)

    times = {function: [] for function in (loop, kernel, loop_both, kernel_both)}
    for _ in range(2):
        for function, seconds in times.items():
            for _ in range(1 if function in (loop, loop_both) else 5):
                start = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - start)
    middle = {function: statistics.median(seconds) for function, seconds in times.items()}
    return middle[loop] / middle[kernel], middle[loop_both] / middle[kernel_both]


@pytest.mark.slow
@pytest.mark.parametrize(("length", "state"), SPEED)
def test_the_kernel_is_faster_than_the_plain_loop_by_half_of_what_is_promised(length, state, threads):
    if LEVELS[0] == "plain":
        pytest.skip("without AVX2 the ratio is printed by the benchmark only")
    threads(2)
    share = {"avx512": 0.5, "avx2": 0.25}[LEVELS[0]]
    for _ in range(2):
        forward, both = _ratios(length, state)
        bars = [bar * share for bar in SPEED[length, state]]
        if forward >= bars[0] and both >= bars[1]:
            return
    raise AssertionError(f"{forward:.0f} and {both:.0f} times as fast, wanted {bars}")
