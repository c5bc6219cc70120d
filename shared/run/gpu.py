"""What the papers' ``gpu_evidence.py`` share: times of calls on the GPU, the file of figures, the trainings."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch

from shared.errors import UserError
from shared.run.config import repository_root

REPEATS, CALLS = 20, 10  # of every measurement; calls in one, so that what launches them is not timed
CHECKERS = min(16, os.cpu_count() or 1)  # processes that check, most of whose time goes into compiling
HEAD_START = 20_000_000  # cycles for which the GPU waits, while the calls are queued


def require_gpu() -> None:
    """Raise UserError where PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to PyTorch: run this on a machine with one")


def milliseconds(
    calls: dict[str, Callable[[], object]], repeats: int = REPEATS, queued: int = CALLS
) -> dict[str, dict[str, float]]:
    """Return median, least and largest time of a call on the GPU, ``queued`` of one form after the other in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            begin.record()
            for _ in range(queued):
                call()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(begin.elapsed_time(end) / queued)
    return {n: {"median": statistics.median(t), "least": min(t), "largest": max(t)} for n, t in times.items()}


def _strictly(check: Callable[..., dict], case: dict) -> dict:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory holds NaN
    try:
        return check(**case)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def checks_of(check: Callable[..., dict], cases: list[dict]) -> list[dict]:
    """Return what ``check`` finds of every case, in fresh memory that holds NaN; CHECKERS processes share them."""
    if CHECKERS == 1:
        return [_strictly(check, case) for case in cases]
    with ProcessPoolExecutor(CHECKERS, get_context("spawn")) as pool:
        return list(pool.map(_strictly, repeat(check), cases))


def write_figures(found: dict, path: Path) -> None:
    """Write figures as JSON, never half of them."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    os.replace(partial, path)


def train_rows(paper: str, starts: tuple[str, ...], data_root: Path, workers: int) -> int:
    """Train the lite rows of a paper whose names start so, seeds without evidence; return the exit code.

    Every row is a process, ``workers`` of them at a time, which share the processor's cores.
    """
    from shared.run.launch import rows_of  # Hydra need not be there to check and time

    command = [sys.executable, "-m", "shared.run", "reproduce", paper, "--scale", "lite"]
    command += ["--data-root", str(data_root)]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def train(row: str) -> int:
        return subprocess.run([*command, "--rows", row], cwd=repository_root(), env=surroundings).returncode

    rows = [row for row in rows_of(paper, "lite") if row.startswith(starts)]
    with ThreadPoolExecutor(workers) as pool:
        return max(pool.map(train, rows))
