"""The training step of retrieval, and the schedule that the paper trains by.

Recipe of Proxy-Anchor (README and train.py of the release, ``configs/optim``): AdamW, the proxies with a rate of their
own, gradients clipped by value, the first epochs for the heads and proxies alone, the rate falling by steps of epochs.
The other losses follow the repositories that the authors name (``optim/confusezius.yaml``, ``optim/gedml.yaml``). Every
random choice is keyed by (seed, step), so that neither ranks nor an interruption change it.
"""

import torch
from torch import Tensor, nn

from idml.config import IDMLConfig, OptimConfig
from idml.embedding import EmbeddingNetwork
from idml.losses import MetricLoss
from idml.objective import mixup_lambda, objective
from shared.data.keyed import keyed_bits, stream
from shared.training.guard import GuardedModule

MINING = stream("idml.mining")
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}  # of classification it is SGD


def decay(epoch: float, optim: OptimConfig) -> float:
    """Return the part of the rate that is left: ``gamma`` for every milestone that is reached."""
    return optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)


class RetrievalModule(GuardedModule):
    """Trains a network of embeddings with a metric loss."""

    def __init__(self, network: EmbeddingNetwork, loss: MetricLoss, cfg: IDMLConfig, steps_per_epoch: int):
        super().__init__()
        self.model, self.metric_loss = network, loss
        self.optim, self.mixup_alpha, self.seed = cfg.optim, cfg.objective.mixup_alpha, cfg.seed
        self.steps_per_epoch = steps_per_epoch

    def warming_up(self) -> bool:
        """Return whether this step trains the heads and the proxies alone."""
        return self.global_step < self.optim.warmup_epochs * self.steps_per_epoch

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if hasattr(self.metric_loss.miner, "seed_step"):
            self.metric_loss.miner.seed_step(int(keyed_bits(MINING, self.seed, batch_idx)) >> 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.last_loss = loss = self.loss(batch, batch_idx)
        self.log_dict({"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"]}, prog_bar=True)
        return loss

    def loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the objective, 0-d, of this rank's part of a batch: images (B, 3, H, W), labels (B,) int64."""
        lam = None
        if self.mixup_alpha is not None:
            lam = mixup_lambda(self.seed, step, self.mixup_alpha)
        return objective(self.model, self.metric_loss, batch["images"], batch["labels"], lam)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.warming_up() and not self.step_was_skipped:
            # AdamW passes over what has no gradient and keeps no memory of it: its first step comes after the warm-up.
            for parameter in self.model.backbone_parameters():
                parameter.grad = None

    def configure_optimizers(self):
        optim = self.optim
        groups = [
            {"params": list(self.model.head_parameters()), "lr": optim.lr},
            {"params": list(self.model.backbone_parameters()), "lr": optim.lr},
        ]
        if self.metric_loss.proxies():
            group = {"params": self.metric_loss.proxies(), "lr": optim.lr * optim.proxy_lr_factor}
            if optim.proxy_weight_decay is not None:
                group["weight_decay"] = optim.proxy_weight_decay
            groups.append(group)
        optimizer = OPTIMIZERS[optim.optimizer](groups, weight_decay=optim.weight_decay)

        def factor(step: int) -> float:
            return decay(step / self.steps_per_epoch, optim)

        def backbone_factor(step: int) -> float:
            return factor(step) if step >= optim.warmup_epochs * self.steps_per_epoch else 0.0

        factors = [factor, backbone_factor, factor][: len(groups)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameters_of(network: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
