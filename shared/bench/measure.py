"""Seconds and extra memory of calls on this machine, measured so that other load on it does least harm."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from shared.environment import forget_peak, resident_bytes


class Measured(NamedTuple):
    """Median seconds of the calls, the rise of resident memory at its peak in bytes (None: not told), the result."""

    seconds: float
    extra_bytes: int | None
    result: object


def measured(prepare: Callable[..., Callable[[], object]], *arguments, threads: int, repeats: int = 1) -> Measured:
    """Measure the call that ``prepare(*arguments)`` returns; a call of its own before that is up to it.

    ``prepare`` is importable from its module; arguments and result are pickled. Only Linux tells memory.
    """
    # Read when the libraries load: faiss and scikit-learn take their threads from it.
    kept = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_measure, (prepare, arguments, threads, repeats))
    finally:
        if kept is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = kept


def _measure(prepare, arguments, threads: int, repeats: int) -> Measured:
    torch.set_num_threads(threads)
    call = prepare(*arguments)
    calls = [_timed(call) for _ in range(repeats)]
    # The first call's memory: what it freed, later ones may take again without a rise.
    return Measured(sorted(one.seconds for one in calls)[repeats // 2], calls[0].extra_bytes, calls[-1].result)


def _timed(call: Callable[[], object]) -> Measured:
    told = forget_peak()
    before = resident_bytes("VmRSS") if told else 0
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    return Measured(seconds, resident_bytes("VmHWM") - before if told else None, result)


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of every call: one of each in turn, ``repeats`` times after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(prepare: Callable[..., Callable[[], object]], *arguments) -> int:
    """Return by how much a call raises resident memory at its peak, in a fresh process (Linux; OSError elsewhere).

    As ``measured``, after a call before, so that what is loaded or compiled on first use does not count.
    """
    rise = measured(_called_before, prepare, *arguments, threads=torch.get_num_threads()).extra_bytes
    if rise is None:
        raise OSError("this system does not forget a peak of resident memory")
    return rise


def _called_before(prepare, *arguments) -> Callable[[], None]:
    call = prepare(*arguments)
    call()
    return lambda: (call(), None)[1]  # without the result, which may be large
