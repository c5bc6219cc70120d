"""Which epoch counts: scored after every epoch on the held-out classes and on the test classes.

Three choices are reported, named by what they look at: ``last-epoch`` looks at nothing, ``held-out`` at training
classes that do not train, ``best-test-epoch`` at the test classes, as the release does: its numbers are the best of as
many as there are epochs, on the very images that are reported.
"""

from pathlib import Path

import lightning.pytorch as pl

from idml.config import IDMLConfig
from idml.data import evaluation_batches
from idml.scoring import embed, recall_at_1
from shared.data.images import ImageSet
from shared.errors import UserError
from shared.training.checkpoints import AtomicCheckpointIO

CHOICES = {"last-epoch": "last", "held-out": "held_out", "best-test-epoch": "best_test"}  # and their suffixes


def require_selection(cfg: IDMLConfig) -> None:
    """Raise UserError where the selection is unknown, or needs classes that are not held out."""
    if cfg.selection not in CHOICES:
        raise UserError(f"selection={cfg.selection} is unknown: choose one of {', '.join(CHOICES)}")
    if cfg.selection == "held-out" and not cfg.data.held_out:
        raise UserError("selection=held-out needs training classes that do not train: set data.held_out above 0")


class EpochSelection(pl.Callback):
    """Keeps R@1 of every epoch, and the weights of the best one of either set in ``folder``.

    ``sets``: choice -> images. Stands before the callback that saves checkpoints, so that they hold its state.
    """

    def __init__(self, cfg: IDMLConfig, folder: Path, sets: dict[str, ImageSet], steps_per_epoch: int):
        self.folder, self.sets, self.steps_per_epoch = folder, sets, steps_per_epoch
        self.workers = cfg.trainer.workers
        self.curves: dict[str, list[float]] = {choice: [] for choice in sets}
        self.batches = {choice: evaluation_batches(cfg, images) for choice, images in sets.items()}

    def path(self, choice: str) -> Path:
        """Return the file of the weights of a choice."""
        return self.folder / ("last.ckpt" if choice == "last-epoch" else f"{choice}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.steps_per_epoch or not trainer.is_global_zero:
            return
        network = pl_module.model
        for choice, batches in self.batches.items():
            curve = self.curves[choice]
            curve.append(recall_at_1(embed(network, batches, pl_module.device, self.workers)))
            if curve[-1] > max(curve[:-1], default=-1.0):  # of equals the first
                state = {f"model.{name}": value for name, value in network.state_dict().items()}
                content = {"state_dict": state, "global_step": trainer.global_step, "epoch": len(curve)}
                AtomicCheckpointIO().save_checkpoint(content, self.path(choice))
        network.train()

    def best_epoch(self, choice: str) -> int:
        """Return the number of the best epoch of a set, from 1."""
        curve = self.curves[choice]
        return 1 + curve.index(max(curve))

    def state_dict(self) -> dict:
        return {"curves": self.curves}

    def load_state_dict(self, state: dict) -> None:
        self.curves = state["curves"]
