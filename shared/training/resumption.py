"""Resumption: what plain Lightning does not keep, so that a killed run ends with the weights of an unbroken one."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.training.ranks import rank

log = logging.getLogger(__name__)


class Resumption(pl.Callback):
    """Saves ``path`` every ``every`` steps with the number of consumed batches and torch's generator states.

    The generators are put back at the first resumed batch, not at loading, because Lightning draws from them in
    between. The checkpoint carries the names of the run's folders, row and seed with the configuration's hash, and is
    refused in any other (UserError).
    """

    def __init__(self, path: Path, every: int, sampler: KeyedBatchSampler):
        self.path, self.every, self.sampler = Path(path), every, sampler
        self.consumed, self.run = 0, "/".join(self.path.absolute().parts[-3:-1])
        self.generators: list[torch.Tensor] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.consumed = batch_idx + 1
        if self.consumed % self.every == 0 and self.consumed < trainer.num_training_batches:
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        generators = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        return {"consumed": self.consumed, "generators": generators, "run": self.run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("run", self.run) != self.run:
            raise UserError(f"{self.path} is a checkpoint of {state['run']}: move it away, and the run begins anew")
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
