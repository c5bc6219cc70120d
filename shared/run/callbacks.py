"""Resumption: what plain Lightning does not keep, so that a killed run ends with the weights of an unbroken one."""

import os
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from shared.data.sampler import KeyedBatchSampler


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, syncs, renames; reads with ``weights_only=True``.

    A reader therefore finds the previous checkpoint or the new one, never half of one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class Resumption(pl.Callback):
    """Saves ``path`` every ``every`` steps with the sampler's position and torch's generator state.

    The generator is put back at the first resumed batch, not at loading, because Lightning draws from it in
    between. A checkpoint that falls on the last batch of an epoch is written when the epoch has ended, since
    Lightning would otherwise count that epoch a second time.
    """

    def __init__(self, path: Path, every: int, sampler: KeyedBatchSampler):
        self.path, self.every, self.sampler = Path(path), every, sampler
        self.position = (0, 0)
        self.generator: torch.Tensor | None = None
        self.saved_at = 0

    def _save(self, trainer: pl.Trainer, epoch: int, batch: int) -> None:
        self.position, self.saved_at = (epoch, batch), trainer.global_step
        trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        due = trainer.global_step - self.saved_at >= self.every
        if due and batch_idx + 1 < trainer.num_training_batches:
            self._save(trainer, trainer.current_epoch, batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module) -> None:
        if trainer.global_step - self.saved_at >= self.every:
            self._save(trainer, trainer.current_epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        epoch, batch = self.position
        return {"epoch": epoch, "batch": batch, "step": self.saved_at, "generator": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved_at, self.generator = state["step"], state["generator"]
        self.sampler.resume_at(state["epoch"], state["batch"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        if self.generator is not None:
            torch.set_rng_state(self.generator)
            self.generator = None
