"""The training step of retrieval, and the schedule that the paper trains by.

Recipe (README and train.py of the release, ``configs/optim``): AdamW, the proxies with a rate of their own, gradients
clipped by value, the first epochs for the heads and proxies alone, the rate falling by steps of epochs. Every random
choice is keyed by (seed, step), so that neither ranks nor an interruption change it.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from idml.embedding import EmbeddingNetwork
from idml.losses import MetricLoss
from idml.objective import objective, share_of_first
from shared.data.keyed import keyed_bits
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.run.module import GuardedModule

MINING = 42  # first part of a key: what is drawn


def decay(epoch: float, optim) -> float:
    """Return the part of the rate that is left: ``gamma`` for every milestone that is reached."""
    return optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)


class RetrievalModule(GuardedModule):
    """Trains a network of embeddings with a metric loss."""

    def __init__(self, network: EmbeddingNetwork, loss: MetricLoss, cfg, steps_per_epoch: int):
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
        share = None
        if self.mixup_alpha is not None:
            share = share_of_first(self.seed, step, self.mixup_alpha)
        return objective(self.model, self.metric_loss, batch["images"], batch["labels"], share)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.warming_up() and not self.step_was_skipped:
            # A rate of 0 keeps the weights, a gradient of 0 keeps the optimiser's memory empty as well.
            for parameter in self.model.backbone_parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    def configure_optimizers(self):
        optim = self.optim
        groups = [
            {"params": list(self.model.head_parameters()), "lr": optim.lr},
            {"params": list(self.model.backbone_parameters()), "lr": optim.lr},
        ]
        if self.metric_loss.proxies():
            groups.append({"params": self.metric_loss.proxies(), "lr": optim.lr * optim.proxy_lr_factor})
        optimizer = torch.optim.AdamW(groups, weight_decay=optim.weight_decay)

        def factor(step: int) -> float:
            return decay(step / self.steps_per_epoch, optim)

        def backbone_factor(step: int) -> float:
            return factor(step) if step >= optim.warmup_epochs * self.steps_per_epoch else 0.0

        factors = [factor, backbone_factor, factor][: len(groups)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TrainingData(pl.LightningDataModule):
    """The training batches; one sampler that resumption can move."""

    def __init__(self, batches, sampler: KeyedBatchSampler, mixes: bool, workers: int = 0):
        super().__init__()
        self.batches, self.sampler, self.mixes, self.workers = batches, sampler, mixes, workers

    def require_equal_pairs(self, ranks: int) -> None:
        """Raise UserError where ``ranks`` would mix other pairs of images than one process does."""
        size = self.sampler.batch_size
        if self.mixes and ranks > 1 and size % (2 * ranks):
            raise UserError(
                f"a batch of {size} mixed images cannot be shared by {ranks} ranks: set optim.batch_size to a "
                f"multiple of {2 * ranks}"
            )

    def setup(self, stage: str) -> None:
        self.require_equal_pairs(self.trainer.world_size)
        self.sampler.rank, self.sampler.world_size = self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> DataLoader:
        # A generator of its own: a loader otherwise draws from torch's global one at every epoch.
        return DataLoader(
            self.batches,
            sampler=self.sampler,
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(0),
        )


def parameters_of(network: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
