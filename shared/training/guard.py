"""The LightningModule of every paper: a step that is not finite changes nothing, too many of them end the training."""

import logging
from pathlib import Path

import lightning.pytorch as pl
import torch

from shared.errors import UserError
from shared.records import is_diverged
from shared.training.ranks import any_rank

log = logging.getLogger(__name__)
# A skipped step leaves the weights as they were, so only other images can make the next one finite: ten batches in a
# row say that the weights are what is wrong. A share says nothing of so few steps that a bad batch or two make it up.
MOST_IN_A_ROW, ENOUGH_STEPS = 10, 200


class GuardedModule(pl.LightningModule):
    """Skips the update, on every rank, where the loss or a gradient is not finite on any rank.

    Optimiser, schedule and whatever asks ``step_was_skipped`` (EMA, momentum encoder) stay as they were and
    the buffers (batch-norm statistics) are put back. Not for 16-mixed, which ``checks.PRECISIONS`` leaves out: a
    gradient scaler keeps its own account of such steps. UserError, on every rank at the same step, where MOST_IN_A_ROW
    are skipped, or more of ENOUGH_STEPS and more than ``records.is_diverged`` allows.
    """

    rate_key = "optim.lr"  # of the configuration, the learning rate
    step_was_skipped = False
    counted_steps = skipped_steps = skipped_in_a_row = 0
    last_loss = torch.zeros(())  # of the present step, where ``training_step`` puts it
    checkpoint: Path | None = None  # where the run keeps one, which is never of a step that was skipped

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["skipped_steps"], checkpoint["skipped_in_a_row"] = self.skipped_steps, self.skipped_in_a_row

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.counted_steps, self.skipped_steps = checkpoint["global_step"], checkpoint["skipped_steps"]
        self.skipped_in_a_row = checkpoint.get("skipped_in_a_row", 0)

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        self._buffers_before = [buffer.clone() for buffer in self.buffers()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # The sum of absolute values is finite only if every element is; one transfer for all parameters.
        total = torch.stack(torch._foreach_norm(gradients, 1)).sum() + self.last_loss.detach()
        self.step_was_skipped = any_rank(~torch.isfinite(total))
        self.counted_steps += 1
        if not self.step_was_skipped:
            self.skipped_in_a_row = 0
            return
        # An optimiser passes over parameters without a gradient, their state and weight decay included.
        for parameter in self.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in zip(self.buffers(), self._buffers_before, strict=True):
                buffer.copy_(before)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        log.warning("skipped step %d: its loss or a gradient is not finite", self.counted_steps)
        if self.skipped_in_a_row >= MOST_IN_A_ROW or self.counted_steps >= ENOUGH_STEPS:
            self.require_convergence(optimizer)

    def require_convergence(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError where too many of the steps so far were skipped for the training to be a result."""
        in_a_row, skipped, steps = self.skipped_in_a_row, self.skipped_steps, self.counted_steps
        if in_a_row < MOST_IN_A_ROW and not is_diverged(skipped, steps):
            return
        is_kept = self.checkpoint is not None and self.checkpoint.exists()
        kept = f"the last good checkpoint is {self.checkpoint}" if is_kept else "there is no good checkpoint"
        where = f"at step {steps} and learning rate {optimizer.param_groups[0]['lr']:g}; {kept}: lower {self.rate_key}"
        what = f"{skipped} of {steps} steps had a loss or gradient that is not finite, the last {in_a_row} in a row"
        raise UserError(f"the training diverged: {what}, {where}")

    def step_counts(self) -> dict[str, float]:
        """Return how many steps were taken and how many of them were skipped, by the names of a run's metrics."""
        return {"steps_trained": float(self.counted_steps), "skipped_steps": float(self.skipped_steps)}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if not self.step_was_skipped:  # without gradients clipping by value fails
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler, metric) -> None:
        if not self.step_was_skipped:
            super().lr_scheduler_step(scheduler, metric)
