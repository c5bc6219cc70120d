"""Resumption: what plain Lightning does not keep, so that a killed run ends with the weights of an unbroken one."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from shared.data.sampler import KeyedBatchSampler
from shared.run.checkpoints import read_file
from shared.run.ranks import rank

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, syncs, renames; reads with ``weights_only=True``.

    A reader therefore finds the previous checkpoint or the new one, never half of one; UserError where a disk has
    damaged it all the same.
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
        return read_file(path, "move it away, and the run begins anew", map_location or "cpu")


class Resumption(pl.Callback):
    """Saves ``path`` every ``every`` steps with the number of consumed batches and torch's generator states.

    The generators are put back at the first resumed batch, not at loading, because Lightning draws from them in
    between.
    """

    def __init__(self, path: Path, every: int, sampler: KeyedBatchSampler):
        self.path, self.every, self.sampler = Path(path), every, sampler
        self.consumed = 0
        self.generators: list[torch.Tensor] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.consumed = batch_idx + 1
        if self.consumed % self.every == 0 and self.consumed < trainer.num_training_batches:
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        generators = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return {"consumed": self.consumed, "generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed, self.generators = state["consumed"], state["generators"]
        self.sampler.resume_at(self.consumed)
        if self.consumed < self.sampler.steps and rank() == 0:
            log.info("%s: goes on behind step %d of %d", self.path, self.consumed, self.sampler.steps)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        if self.generators is not None:
            torch.set_rng_state(self.generators[0])
            if len(self.generators) - 1 == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self.generators[1:])
            self.generators = None
