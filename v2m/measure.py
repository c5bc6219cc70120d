"""Time and memory of functions on this machine, measured so that other load on it does most harm to none."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from shared.metrics.record import forget_peak


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every call: one of each in turn, ``repeats`` times after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each list of seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(prepare: Callable[..., Callable[[], object]], *arguments) -> int:
    """Return by how much a call raises resident memory at its peak, in a fresh process (Linux).

    ``prepare(*arguments)`` makes the inputs and returns the call; both are importable from their module. The call
    runs once before, so that what is loaded or compiled on first use does not count.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_raise_of_peak, (prepare, arguments))


def _raise_of_peak(prepare, arguments) -> int:
    call = prepare(*arguments)
    call()
    if not forget_peak():
        raise OSError("this system does not forget a peak of resident memory")
    before = resident_bytes("VmRSS")
    kept = call()
    raised = resident_bytes("VmHWM") - before
    del kept
    return raised


def resident_bytes(key: str) -> int:
    """Return this process's resident memory now (VmRSS) or at its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024
