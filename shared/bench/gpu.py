"""What the papers' ``gpu_evidence.py`` share: command line, checks, times on the GPU, file of figures, trainings."""

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from shared.claims.compose import quoted, row_config
from shared.claims.protocol import load_paper
from shared.command_line import Parser, print_error
from shared.environment import environment, git_state, repository_root
from shared.errors import UserError
from shared.files import write_text

REPEATS, CALLS = 20, 10  # of every measurement; calls in one, so that what launches them is not timed
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


def worst_of(errors: dict[str, float]) -> str:
    """Return the name of the largest error; one that is no number is larger than any."""
    return max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))


class Figures:
    """What was measured on this GPU, a JSON file that is written anew with every part, never half of it.

    It begins with the commit and the machine; ``checks``, the first part, are dicts with ``green``. Raises UserError
    where the file cannot be written, before anything is measured.
    """

    def __init__(self, path: Path):
        commit, dirty = git_state(repository_root())
        self.path, self.parts = path, {"commit": commit, "dirty": dirty, **environment()}
        try:
            self.add()
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): give another folder with --out") from error

    def add(self, **parts) -> None:
        self.parts |= parts
        write_text(self.path, json.dumps(self.parts, indent=1, default=str))

    @property
    def green(self) -> bool:
        return all(check["green"] for check in self.parts["checks"])

    def show(self, table: Table, lines: list[str]) -> None:
        """Print the checks that are red, the times, and further lines."""
        checks = self.parts["checks"]
        red = [check for check in checks if not check["green"]]
        console = Console()
        console.print(f"{len(checks) - len(red)} of {len(checks)} checks hold; all figures: {self.path}", markup=False)
        for check in red:
            console.print(f"red: {check}", markup=False)
        if table.rows:
            console.print(table)
        for line in lines:
            console.print(line, markup=False)


def run_script(
    paper: str,
    description: str,
    measure: Callable[[argparse.Namespace], bool],
    rows: tuple[str, ...],
    arguments: list[str] | None,
    workers: int,
) -> int:
    """Run a paper's script: measure, then train the lite rows whose names start so where a data root is given.

    ``measure`` takes the options and returns whether every check is green. Returns the exit code: 0, 1 where a check
    is red or a training failed, 2 after one sentence on standard error.
    """
    parser = Parser(prog=f"python -m {paper}.tools.gpu_evidence", description=description)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the figures")
    parser.add_argument("--mamba-ssm-source", type=Path, help="its checkout, to compile and time beside the scans")
    parser.add_argument("--timed-forms-only", action="store_true", help="of the scans check what is timed alone")
    parser.add_argument("--data-root", type=Path, help="train the lite rows meant for a GPU too, from here")
    parser.add_argument("--workers", type=int, default=workers, help="processes that train side by side")
    try:
        options = parser.parse_args(arguments)
        code = 0 if measure(options) else 1
        if options.data_root is not None:
            code = max(code, train_rows(paper, rows, options.data_root, options.workers))
        return code
    except UserError as error:
        print_error(f"error: {error}")
        return 2


def train_rows(paper: str, starts: tuple[str, ...], data_root: Path, workers: int) -> int:
    """Train the lite rows of a paper whose names start so, seeds without evidence; return 0, or 1 where one failed.

    Every row is a process, ``workers`` of them at a time, which share the processor's cores.
    """
    named, surroundings = load_paper(repository_root(), paper), dict(os.environ)
    surroundings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    command = [*named.command("train"), "--multirun", f"paths.data_root={quoted(str(data_root.absolute()))}"]
    lines = []
    for row in (row.Row for row in named.ledger.rows_of_scale("lite") if row.Row.startswith(starts)):
        seeds = ",".join(map(str, row_config(named, row, 0).launcher.seeds))
        lines.append([*command, f"seed={seeds}", f"+experiment={row}"])

    def train(line: list[str]) -> int:
        return subprocess.run(line, cwd=repository_root(), env=surroundings).returncode

    with ThreadPoolExecutor(workers) as pool:
        return int(any(list(pool.map(train, lines))))  # below 0 where a signal ended one
