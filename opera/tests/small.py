"""A run small enough for tests: the digits, a tiny network, batches of 128; 11 batches make an epoch."""

from pathlib import Path

from hydra import compose, initialize_config_dir

import opera.config  # noqa: F401  (registers the types of the configuration)
from shared.run.config import repository_root

SMALL = [
    "heads.dim=16",
    "heads.hidden=32",
    "heads.class_hidden=16",
    "task.epochs=2",
    "trainer.accelerator=cpu",
    "logging.csv=false",
    "logging.tensorboard=false",
]
BATCHES_AN_EPOCH = 11  # 1438 digits


def small_config(folder: Path, *overrides: str, epochs: int = 1):
    """Return the config of such a run with its paths under ``folder``."""
    paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
    warmup = "optim.warmup_epochs=0.2"
    # Once the ledger stands, ``shared.run.config.compose`` does this.
    with initialize_config_dir(str(repository_root() / "opera/configs"), version_base="1.3"):
        return compose("train", [*SMALL, f"scale.epochs={epochs}", warmup, *paths, *overrides])
