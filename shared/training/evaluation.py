"""Scoring a checkpoint without training: what the evaluation of every paper does around its own scores."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from shared.commands import report, silence_library_logs
from shared.errors import UserError
from shared.metrics.names import load_names
from shared.training.application import Check
from shared.training.checks import check_machine
from shared.training.config import run_folder

# (cfg, checkpoint, folder of the pictures) -> metrics by the names of a run
Score = Callable[[DictConfig, Path, Path], dict]


def run_evaluation(
    cfg: DictConfig,
    score: Score,
    check: Check | None = None,
    default_checkpoint: Callable[[DictConfig], Path] = lambda cfg: run_folder(cfg) / "last.ckpt",
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
        checkpoint = Path(cfg.ckpt) if cfg.ckpt else default_checkpoint(cfg)
        folder = _picture_folder(cfg, checkpoint)
        metrics = score(cfg, checkpoint, folder)
    except Exception as error:
        sys.exit(report(error))
    table = Table("metric", "value", title=f"{cfg.row}, seed {cfg.seed}", title_justify="left")
    for name, value in metrics.items():
        table.add_row(*(cell.replace("[", "\\[") for cell in load_names().cells(name, value)))
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    console.print(table)
    for what, path in (("checkpoint", checkpoint), ("pictures", folder)):
        if path.exists():
            console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def _picture_folder(cfg: DictConfig, checkpoint: Path) -> Path:
    """Return a new folder for the pictures; UserError where the checkpoint is missing or the folder holds files."""
    if checkpoint.exists() and not checkpoint.is_file():
        raise UserError(f"{checkpoint} is no file: name a checkpoint in it with CKPT= (ckpt=)")
    if not checkpoint.exists():
        train = f"make reproduce-{cfg.paper} SCALE={cfg.scale.name} ROWS={cfg.row} SEEDS={cfg.seed}"
        raise UserError(f"{checkpoint} is missing: train it with `{train}`, or name another one with CKPT=")
    beside = (checkpoint.with_name(f"evaluation-{number}") for number in itertools.count(1))
    folder = Path(cfg.out) if cfg.out else next(path for path in beside if not path.exists())
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty: give a new folder with OUT= (out=)")
    return folder
