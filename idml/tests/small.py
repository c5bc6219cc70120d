"""A run small enough for tests: the digits 0 to 4, a tiny network, batches of 32; 28 batches make an epoch."""

from pathlib import Path

from shared.claims.compose import compose

SMALL = [
    "model.semantic_dim=8",
    "optim.batch_size=32",
    "evaluation.kmeans_seeds=1",
    "trainer.accelerator=cpu",
    "logger=none",
]
BATCHES_AN_EPOCH = 28  # 901 digits of five classes
INTROSPECTIVE = ["metric=introspective", "objective=mixup"]


def small_config(folder: Path, *overrides: str, epochs: int = 1):
    """Return the config of such a run with its paths under ``folder``."""
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
    return compose("idml", [*SMALL, f"scale.epochs={epochs}", *paths, *overrides])
