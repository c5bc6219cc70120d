"""Scores of a detector or a segmenter during its training, as mmdet and mmseg have them; none is chosen from."""

import time
from collections.abc import Callable

import lightning.pytorch as pl
from torch import nn

from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError

PARTS = 10  # of a training that counts steps, in the place of epochs: 16,000 of 160,000 steps, as in mmseg
BEST = "best_epoch"
COUNTS = ("n_test",)


class DenseValidation(pl.Callback):
    """Scores the model after every ``every``-th epoch, or tenth of a length in steps, and at the end; ranks share that.

    ``score(model, is_last)`` gives the scores, the first of which says which epoch was the best. Stands before the
    callback that saves checkpoints, which then hold what was scored. UserError for a number below 1.
    """

    def __init__(
        self,
        every: int | None,
        sampler: KeyedBatchSampler,
        epochs: float | None,
        score: Callable[[nn.Module, bool], dict],
    ):
        if every is not None and every < 1:
            raise UserError(f"output.validate_every={every}: set 1 or more epochs, or null for none")
        self.steps, self.steps_per_epoch = sampler.steps, sampler.length // sampler.batch_size
        self.score, self.seconds, parts = score, 0.0, epochs or PARTS
        self.due = {round(point * self.steps / parts) for point in (range(every, int(parts), every) if every else ())}
        self.curve: dict[int, dict[str, float]] = {}  # by step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        step = batch_idx + 1
        is_last = step == self.steps
        if not is_last and step not in self.due:
            return
        begin, modes = time.perf_counter(), {part: part.training for part in pl_module.model.modules()}
        self.curve[step] = self.score(pl_module.model, is_last)
        for part, mode in modes.items():
            part.training = mode
        self.seconds += time.perf_counter() - begin

    def with_best(self) -> dict[str, float]:
        """Return the last scores and, where there are others, those of the best epoch, the first of equals."""
        last = self.curve[self.steps]
        if len(self.curve) == 1:
            return last
        first = next(iter(last))
        best = max(sorted(self.curve), key=lambda step: self.curve[step][first])
        scores = {f"{name}_best": value for name, value in self.curve[best].items() if name not in COUNTS}
        return last | {BEST: best / self.steps_per_epoch} | scores

    def state_dict(self) -> dict:
        return {"curve": self.curve}

    def load_state_dict(self, state: dict) -> None:
        self.curve = state["curve"]
