"""The LightningModule from which every paper's module derives: a step that is not finite changes nothing."""

import logging

import lightning.pytorch as pl
import torch

from shared.training.ranks import any_rank

log = logging.getLogger(__name__)


class GuardedModule(pl.LightningModule):
    """Skips the update, on every rank, where the loss or a gradient is not finite on any rank.

    Optimiser, schedule and whatever asks ``step_was_skipped`` (EMA, momentum encoder) stay as they were and
    the buffers (batch-norm statistics) are put back. Not for 16-mixed, which ``checks.PRECISIONS`` leaves out: a
    gradient scaler keeps its own account of such steps.
    """

    step_was_skipped = False
    skipped_steps = 0
    last_loss = torch.zeros(())  # of the present step, where ``training_step`` puts it

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.skipped_steps = checkpoint["skipped_steps"]

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        self._buffers_before = [buffer.clone() for buffer in self.buffers()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # The sum of absolute values is finite only if every element is; one transfer for all parameters.
        total = torch.stack(torch._foreach_norm(gradients, 1)).sum() + self.last_loss.detach()
        self.step_was_skipped = any_rank(~torch.isfinite(total))
        if not self.step_was_skipped:
            return
        # An optimiser passes over parameters without a gradient, their state and weight decay included.
        for parameter in self.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in zip(self.buffers(), self._buffers_before, strict=True):
                buffer.copy_(before)
        self.skipped_steps += 1
        log.warning("skipped step %d: its loss or a gradient is not finite", self.global_step)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if not self.step_was_skipped:  # without gradients clipping by value fails
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler, metric) -> None:
        if not self.step_was_skipped:
            super().lr_scheduler_step(scheduler, metric)
