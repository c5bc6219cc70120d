"""Checkpoints: written so that none is ever half there, read back with ``weights_only=True``, resumed where they end.

Plain Lightning does not keep what a killed run needs to end with the weights of an unbroken one; Resumption does.
"""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.files import whole_file
from shared.training.ranks import rank

log = logging.getLogger(__name__)
PREFIX = "model."  # of the network's tensors among those of the LightningModule


def read_file(path: Path, remedy: str, map_location: str | torch.device = "cpu") -> Any:
    """Return what a checkpoint file holds; UserError, ending in the remedy, for one that is missing or damaged."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except Exception as error:  # the reader raises almost anything on damaged bytes
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}): {remedy}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the network's tensors by name and the optimiser steps taken; UserError for a damaged file."""
    remedy = "give the last.ckpt of a run, or train it again"
    content = read_file(path, remedy)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "global_step" not in content:
        raise UserError(f"{path} is no checkpoint of a run (it has no state_dict and global_step): {remedy}")
    named = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return named, int(content["global_step"])


def load_weights(network: nn.Module, state: dict[str, Tensor], row: str, path: Path) -> None:
    """Put the tensors into the network; UserError where they are not those of this very arrangement."""
    own, given = ({name: value.shape for name, value in tensors.items()} for tensors in (network.state_dict(), state))
    unfit = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if unfit:
        raise UserError(
            f"{path} does not fit row {row}: {len(unfit)} tensors are missing, unknown or of another shape, such "
            f"as {unfit[0]}; give the row and the overrides that it was trained with"
        )
    network.load_state_dict(state)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A reader finds the previous checkpoint or the new one, never half of one; UserError where a disk damaged it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        return read_file(path, "move it away, and the run begins anew", map_location or "cpu")


class Resumption(pl.Callback):
    """Saves ``path`` every ``every`` steps with the number of consumed batches and torch's generator states.

    The generators are put back at the first resumed batch, not at loading, because Lightning draws from them in
    between. No checkpoint is saved behind a skipped step, so the last one is good. It carries the names of its two
    folders, a run's row and its seed with the hash, or those of a training inside one, and is refused in any other
    (UserError).
    """

    def __init__(self, path: Path, every: int, sampler: KeyedBatchSampler):
        self.path, self.every, self.sampler = Path(path), every, sampler
        self.consumed, self.run = 0, "/".join(self.path.absolute().parts[-3:-1])
        self.generators: list[torch.Tensor] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.consumed = batch_idx + 1
        is_due = self.consumed % self.every == 0 and self.consumed < trainer.num_training_batches
        if is_due and not pl_module.skipped_in_a_row:
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        generators = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return {"consumed": self.consumed, "generators": generators, "run": self.run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("run") != self.run:
            raise UserError(f"{self.path} is a checkpoint of {state.get('run')}: move it away, and the run begins anew")
        self.consumed, self.generators = state["consumed"], state["generators"]
        self.sampler.resume_at(self.consumed)
        if self.consumed < self.sampler.steps and rank() == 0:
            log.info("%s: continues after step %d of %d", self.path, self.consumed, self.sampler.steps)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        if self.generators is not None:
            torch.set_rng_state(self.generators[0])
            if len(self.generators) - 1 == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self.generators[1:])
            self.generators = None
