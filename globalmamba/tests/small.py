"""A run small enough for tests: the digits, two blocks of width 16, batches of 32; 44 batches make an epoch."""

from pathlib import Path

from shared.claims.compose import compose

SMALL = [
    "model=globalmamba-digits",
    "model.network.embed_dim=16",
    "model.network.depth=2",
    "model.network.state_dim=2",
    "model.tokens.patch_size=2",
    "model.tokens.levels=3",
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
    return compose("globalmamba", [*SMALL, epochs, "optim.warmup_epochs=0.02", *paths, *overrides])
