"""Seconds and extra memory of one call, in a process of its own."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from shared.metrics.record import forget_peak


class Measured(NamedTuple):
    """Median seconds of the calls, the rise of resident memory at its peak in bytes (None: not told), the result."""

    seconds: float
    extra_bytes: int | None
    result: object


def measured(
    prepare: Callable[..., Callable[[], object]], *arguments, threads: int, repeats: int = 1
) -> Measured:
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
    seconds, rises = [], []
    for _ in range(repeats):
        told = forget_peak()
        before = _resident_bytes("VmRSS") if told else 0
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
        rises.append(_resident_bytes("VmHWM") - before if told else None)
    # The first call's memory: what it freed, later ones may take again without a rise.
    return Measured(sorted(seconds)[len(seconds) // 2], rises[0], result)


def _resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024
