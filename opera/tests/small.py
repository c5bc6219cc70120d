"""A run small enough for tests: the digits, a tiny network, batches of 128; 11 batches make an epoch."""

from pathlib import Path

from shared.claims.compose import compose

SMALL = [
    "heads.dim=16",
    "heads.hidden=32",
    "heads.class_hidden=16",
    "task.epochs=2",
    "trainer.accelerator=cpu",
    "logger=none",
]
BATCHES_AN_EPOCH = 11  # 1438 digits


def small_config(folder: Path, *overrides: str, epochs: int = 1):
    """Return the config of such a run with its paths under ``folder``."""
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
    warmup = "optim.warmup_epochs=0.2"
    return compose("opera", [*SMALL, f"scale.epochs={epochs}", warmup, *paths, *overrides])
