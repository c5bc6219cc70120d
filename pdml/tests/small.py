"""A run small enough for tests: the synthetic scene, patches of 5, batches of 8; 14 batches make an epoch."""

from pathlib import Path

from shared.claims.compose import compose

SMALL = ["model=ssftt", "patch_size=5", "optim.batch_size=8", "trainer.accelerator=cpu", "logger=none"]
BATCHES_AN_EPOCH = 14


def small_config(folder: Path, *overrides: str):
    """Return the config of such a run with its paths under ``folder``."""
    return compose("pdml", [*SMALL, f"paths.runs={folder}/runs", f"paths.results={folder}/results", *overrides])
