"""Scoring a checkpoint without training: what the evaluation of every paper does around its own scores."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from shared.commands import silence_library_logs
from shared.errors import UserError
from shared.metrics.names import load_names
from shared.training.application import Check, report
from shared.training.checks import check_machine
from shared.training.config import run_folder

# (cfg, checkpoint, folder of the pictures) -> metrics by the names of a run
Score = Callable[[DictConfig, Path, Path], dict]


def run_evaluation(
    cfg: DictConfig,
    score: Score,
    check: Check | None = None,
    default_checkpoint: Callable[[DictConfig], Path] | None = None,
) -> None:
    """Print the scores of ``cfg.ckpt``, or of the run's own checkpoint; pictures go to ``cfg.out`` or beside it.

    Ends the process as ``command`` does where there is an error: before anything is written, for a checkpoint that is
    missing and for a folder that holds files.
    """
    silence_library_logs()
    try:
        check_machine(cfg)
        if check is not None:
            check(cfg)
        checkpoint, folder = _places(cfg, default_checkpoint)
        metrics = score(cfg, checkpoint, folder)
    except Exception as error:
        sys.exit(report(error))
    table = Table("metric", "value", title=f"{cfg.row}, seed {cfg.seed}", title_justify="left")
    for row in metric_rows(metrics):
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    console.print(table)
    console.print(f"checkpoint: {checkpoint}", markup=False, highlight=False, soft_wrap=True)
    if folder.exists():
        console.print(f"pictures: {folder}", markup=False, highlight=False, soft_wrap=True)


def _places(cfg: DictConfig, default_checkpoint) -> tuple[Path, Path]:
    """Return the checkpoint and a new folder; UserError where the first is missing or the second holds files."""
    own = (default_checkpoint or (lambda cfg: run_folder(cfg) / "last.ckpt"))(cfg)
    checkpoint = Path(cfg.ckpt) if cfg.ckpt else own
    if checkpoint.exists() and not checkpoint.is_file():
        raise UserError(f"{checkpoint} is no file: name a checkpoint in it with CKPT= (ckpt=)")
    if not checkpoint.exists():
        train = f"make reproduce-{cfg.paper} SCALE={cfg.scale.name} ROWS={cfg.row} SEEDS={cfg.seed}"
        raise UserError(f"{checkpoint} is missing: train it with `{train}`, or name another one with CKPT=")
    beside = (checkpoint.with_name(f"evaluation-{number}") for number in itertools.count(1))
    folder = Path(cfg.out) if cfg.out else next(path for path in beside if not path.exists())
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty: give a new folder with OUT= (out=)")
    return checkpoint, folder


def metric_rows(metrics: dict) -> list[list[str]]:
    """Return label and value of every metric as the tables print them; lists one value behind the other."""
    known, rows = load_names().metrics, []
    for name, value in metrics.items():
        if name in known and isinstance(value, float):
            label, text = known[name].label, known[name].text(value)
        elif isinstance(value, list):
            label, text = f"{name} %", ", ".join("–" if v is None else f"{v * 100:.2f}" for v in value)
        else:
            label, text = name, f"{value:g}" if isinstance(value, float) else str(value)
        rows.append([label, text])
    return rows
