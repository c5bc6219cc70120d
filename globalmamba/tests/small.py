"""A run small enough for tests: the digits, two blocks of width 16, batches of 32; 44 batches make an epoch."""

from pathlib import Path

from shared.claims.compose import compose

from .small_network import NETWORK

PAPER = __name__.partition(".")[0]
SMALL = [
    *NETWORK,
    "optim.batch_size=32",
    "optim.ema_decay=0.9",
    "trainer.accelerator=cpu",
    "trainer.backend=chunked",
    "logger=none",
]
BATCHES_AN_EPOCH = 44


def small_config(folder: Path, *overrides: str, steps: int = 3):
    """Return the config of such a run with its paths under ``folder``."""
    epochs = f"scale.epochs={steps / BATCHES_AN_EPOCH}"
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
    return compose(PAPER, [*SMALL, epochs, "optim.warmup_epochs=0.02", *paths, *overrides])
