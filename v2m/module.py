"""The training step of every network here, and the batches that feed it.

Recipe: that of Vim and DeiT (the release's scripts), or VMamba's for its networks; ``configs/optim`` and
``configs/augment`` hold them. Every random choice is keyed by (seed, epoch, image), so that neither workers nor
ranks nor an interruption change it.
"""

import copy
import math
import re

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from shared.data.augment import mix
from shared.data.keyed import keyed_bits, stream
from shared.errors import UserError
from shared.training.guard import GuardedModule
from shared.training.ranks import world_size

from .schema import ClassificationConfig

MIXING = stream("classification.mixing")
DROPPING = stream("classification.dropping")
SCHEDULES = ("step", "epoch-lagged")
A_LOG = re.compile(r"A(_\w+)?_logs?(_\w+)?")
ROUNDING = 1e-6  # of an epoch: the first step of one counts as its own


def parameter_groups(network: nn.Module, weight_decay: float, decay_a_log: bool = False) -> list[dict]:
    """Return the optimiser's groups: no decay on vectors (biases, norms) and on what the network excepts.

    ``decay_a_log``: the logarithms of A, which every network here excepts, are decayed, as the scripts of Vim, of both
    releases and of LocalVim do: they go by the number of axes, and A has two.
    """
    excepted = network.no_weight_decay()
    if decay_a_log:
        excepted = {name for name in excepted if not A_LOG.fullmatch(name.rpartition(".")[2])}
    # timm's, the decayed one first as in the optimiser states of earlier checkpoints.
    return param_groups_weight_decay(network, weight_decay, no_weight_decay_list=excepted)[::-1]


def learning_rate(step: int, steps: int, warmup: int, lr: float, warmup_lr: float, min_lr: float) -> float:
    """Return the rate of a step: a line from ``warmup_lr`` to ``lr``, then half a cosine down to ``min_lr``."""
    if step < warmup:
        return warmup_lr + (lr - warmup_lr) * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def lagged_rate(epoch: int, epochs: float, warmup: float, lr: float, warmup_lr: float, min_lr: float) -> float:
    """Return the rate of an epoch as the scripts of Vim and of both releases set it: behind each epoch, for that epoch.

    So epochs 0 and 1 both run at ``warmup_lr``, and the largest rate comes one epoch after the warm-up; the cosine
    counts the epochs of the warm-up (timm's CosineLRScheduler, ``warmup_prefix`` off). ``warmup`` in epochs.
    """
    over = max(epoch - 1, 0)
    if over < warmup:
        return warmup_lr + (lr - warmup_lr) * over / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(over / epochs, 1.0)))


class ClassificationModule(GuardedModule):
    """Trains a network on soft targets; keeps a moving average of its weights where ``ema_decay`` says so."""

    def __init__(self, network: nn.Module, cfg: ClassificationConfig, steps: int):
        super().__init__()
        self.model = network
        self.optim, self.augment, self.classes, self.seed = cfg.optim, cfg.augment, cfg.data.classes, cfg.seed
        self.steps, self.epochs = steps, cfg.scale.epochs
        if cfg.optim.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule {cfg.optim.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        self.warmup = round(steps * cfg.optim.warmup_epochs / cfg.scale.epochs)
        # Among the module's tensors, so every checkpoint holds it.
        self.average = None
        if cfg.optim.ema_decay is not None:
            self.average = copy.deepcopy(network).requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        # Stochastic depth draws from torch's generator: every rank for itself, every step as if never interrupted.
        torch.manual_seed(int(keyed_bits(DROPPING, self.seed, batch_idx, self.global_rank)) >> 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.last_loss = loss = self.loss(batch, batch_idx)
        self.log_dict({"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"]}, prog_bar=True)
        return loss

    def loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss, 0-d, of this rank's part of a batch: images (B, C, H, W), labels (B,) int64."""
        images, targets = mix(
            batch["images"],
            batch["labels"],
            # The same key on every rank: one draw for the whole batch.
            key=(MIXING, self.seed, step),
            mixup_alpha=self.augment.mixup_alpha,
            cutmix_alpha=self.augment.cutmix_alpha,
            switch_probability=self.augment.switch_probability,
            smoothing=self.augment.smoothing,
            classes=self.classes,
        )
        logits = self.model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets.to(logits.dtype), reduction="none")  # (B,)
        # The sum over all ranks by their common count; DistributedDataParallel averages, which is undone here.
        return losses.sum() * world_size() / self.optim.batch_size

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Here and not at the batch's end, where a checkpoint may have been written already.
        if self.average is not None and not self.step_was_skipped:
            self.update_average()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average to the present weights by 1 - ``ema_decay``; buffers are constants and are copied."""
        averaged, present = list(self.average.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averaged, present, 1 - self.optim.ema_decay)
        for kept, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step by ``optim.schedule``."""
        optim = self.optim
        rates = optim.lr, optim.warmup_lr, optim.min_lr
        if optim.schedule == "step":
            return learning_rate(step, self.steps, self.warmup, *rates)
        epoch = int(step * self.epochs / self.steps + ROUNDING)
        return lagged_rate(epoch, self.epochs, optim.warmup_epochs, *rates)

    def configure_optimizers(self):
        optim = self.optim
        groups = parameter_groups(self.model, optim.weight_decay, optim.decay_a_log)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step) / optim.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
