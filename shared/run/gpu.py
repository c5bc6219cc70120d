"""What the papers' ``gpu_evidence.py`` share: times of calls on the GPU, the file of figures, the trainings."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from shared.errors import UserError
from shared.run.config import repository_root

REPEATS, CALLS = 20, 10  # of every measurement; calls in one, so that what launches them is not timed
HEAD_START = 20_000_000  # cycles for which the GPU waits, while the calls are queued


def require_gpu() -> None:
    """Raise UserError where PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to PyTorch: run this on a machine with one")


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Return median, least and largest time of a call on the GPU, CALLS of one form after the other in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(REPEATS + 2):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            begin.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(begin.elapsed_time(end) / CALLS)
    return {n: {"median": statistics.median(t), "least": min(t), "largest": max(t)} for n, t in times.items()}


def write_figures(found: dict, path: Path) -> None:
    """Write figures as JSON, never half of them."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    os.replace(partial, path)


def train_rows(paper: str, starts: tuple[str, ...], data_root: Path, workers: int) -> int:
    """Train the lite rows of a paper whose names start so, seeds without evidence; return the exit code.

    The processes, ``workers`` of them, share the rows by their locks.
    """
    from shared.run.launch import rows_of  # Hydra need not be there to check and time

    rows = [row for row in rows_of(paper, "lite") if row.startswith(starts)]
    command = [sys.executable, "-m", "shared.run", "reproduce", paper, "--scale", "lite"]
    command += ["--rows", ",".join(rows), "--data-root", str(data_root)]
    started = [subprocess.Popen(command, cwd=repository_root()) for _ in range(workers)]
    return max(process.wait() for process in started)
