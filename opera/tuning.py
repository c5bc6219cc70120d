"""From a pre-trained backbone to a classifier: a linear one on features that stay, "probe", or all of it, "finetune".

The probe is MoCo-v3's: crops and flips, SGD, batch statistics as they were. Fine-tuning and transfer are DeiT's recipe
on timm's augmentations (``shared/data/augment.py``), AdamW.
"""

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from opera.config import OPERAConfig
from opera.module import BATCH
from opera.schedules import learning_rate
from opera.sets import load_classification_set
from shared.data.augment import Augmentation, mix
from shared.data.images import Batches, ImageSet, OrderedBatches, keyed_subset
from shared.data.keyed import keyed_bits, stream
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.metrics.scores import top_hits, top_scores
from shared.training.checks import autocast_context, device_of
from shared.training.fit import TrainingData
from shared.training.guard import GuardedModule
from shared.training.ranks import world_size

KINDS = ("probe", "finetune")
MIXING = stream("opera.tuning.mixing")
DROPPING = stream("opera.tuning.dropping")


class Classifier(nn.Module):
    """Images (B, 3, S, S) -> logits (B, classes): a backbone and a linear map."""

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.num_features, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class TuningModule(GuardedModule):
    """Trains a classifier on a pre-trained backbone; UserError for an unknown kind."""

    rate_key = "task.lr"

    def __init__(self, backbone: nn.Module, classes: int, cfg: OPERAConfig, steps: int):
        super().__init__()
        if cfg.task.kind not in KINDS:
            raise UserError(f"task.kind={cfg.task.kind} is unknown: choose one of {', '.join(KINDS)}")
        self.model, self.classes, self.steps = Classifier(backbone, classes), classes, steps
        self.task, self.seed = cfg.task, cfg.seed
        self.frozen = cfg.task.kind == "probe"
        backbone.requires_grad_(not self.frozen)  # with what a pre-training froze
        self.warmup = round(steps * cfg.task.warmup_epochs / cfg.task.epochs)
        self.train()  # Lightning keeps the mode that a module has

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.frozen:
            self.model.backbone.eval()
        return self

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        torch.manual_seed(int(keyed_bits(DROPPING, self.seed, batch_idx, self.global_rank)) >> 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.last_loss = loss = self.loss(batch, batch_idx)
        self.log_dict({"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"]}, prog_bar=True)
        return loss

    def loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss, 0-d, of this rank's part of a batch: images (B, 3, S, S), labels (B,) int64."""
        images, targets = mix(
            batch["images"],
            batch["labels"],
            key=(MIXING, self.seed, step),
            mixup_alpha=self.task.mixup_alpha,
            cutmix_alpha=self.task.cutmix_alpha,
            switch_probability=0.5,
            smoothing=self.task.smoothing,
            classes=self.classes,
        )
        logits = self.model(images.to(self.model.head.weight.dtype, memory_format=torch.channels_last))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets.to(logits.dtype), reduction="none")
        # The sum over all ranks by their common count; DistributedDataParallel averages, which this undoes.
        return losses.sum() * world_size() / self.task.batch_size

    def parameter_groups(self) -> list[dict]:
        """Return the groups of the trained parameters as DeiT has them, the decayed ones first.

        Biases and normalisations are not decayed, nor what the backbone names: a ViT's positions and class token.
        """
        named = getattr(self.model.backbone, "no_weight_decay", set)()
        kept = {f"backbone.{name}" for name in named}
        return param_groups_weight_decay(self.model, self.task.weight_decay, no_weight_decay_list=kept)[::-1]

    def configure_optimizers(self):
        task = self.task
        if self.frozen:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            rate = task.lr * task.batch_size / BATCH
            optimizer = torch.optim.SGD(trained, rate, momentum=0.9, weight_decay=task.weight_decay)
        else:
            optimizer = torch.optim.AdamW(self.parameter_groups(), task.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, self.steps, self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tuning_data(cfg: OPERAConfig, name: str) -> tuple[TrainingData, ImageSet]:
    """Return the training batches of a set and its test images; UserError for data that are missing or too few."""
    images, test = (load_classification_set(name, split, cfg.paths.data_root) for split in ("train", "test"))
    chosen = None
    if cfg.task.train_images is not None:
        chosen = keyed_subset(images.labels, cfg.task.train_images, cfg.seed)
    batches = Batches(images, Augmentation(cfg.augment), cfg.seed, chosen=chosen)
    if cfg.task.epochs < 1:
        raise UserError(f"task.epochs={cfg.task.epochs} trains nothing: give 1 or more")
    if cfg.task.batch_size > len(batches):
        raise UserError(
            f"{len(batches)} images of {name} do not fill one batch of {cfg.task.batch_size}: lower task.batch_size"
        )
    if cfg.task.repeats < 1:
        raise UserError(f"task.repeats={cfg.task.repeats}: set 1, or how many views of an image a batch holds")
    sampler = KeyedBatchSampler(len(batches), cfg.task.batch_size, cfg.seed, steps=1, repeats=cfg.task.repeats)
    sampler.steps = cfg.task.epochs * (len(batches) // cfg.task.batch_size)
    mixes = cfg.task.mixup_alpha > 0 or cfg.task.cutmix_alpha > 0
    return TrainingData(batches, sampler, mixes, cfg.trainer.workers), test


def scored_batches(cfg: OPERAConfig, images: ImageSet, chosen: np.ndarray | None = None) -> OrderedBatches:
    """Return the images of a set (those of ``chosen`` alone) in order, as they are scored."""
    batches = Batches(images, Augmentation(cfg.augment), cfg.seed, train=False, chosen=chosen)
    return OrderedBatches(batches, cfg.output.batch_size)


@torch.no_grad()
def outputs(
    cfg: OPERAConfig, network: nn.Module, images: ImageSet, chosen: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Return a network's outputs (n, C) for the images of a set, float32 or float64, and labels (n,), on its device.

    ``chosen``: indices of the images; all where None. The network is moved to the device that the config names.
    """
    device = device_of(cfg)
    network = network.to(device).eval()
    dtype = next(network.parameters()).dtype
    parts, labels = [], []
    loader = DataLoader(scored_batches(cfg, images, chosen), batch_size=None, num_workers=cfg.trainer.workers)
    for batch in loader:
        with autocast_context(cfg, device):
            rows = network(batch["images"].to(device, dtype))
        parts.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        labels.append(batch["labels"].to(device))
    return torch.cat(parts), torch.cat(labels)


def logit_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top1 and top5, fractions, of logits (n, classes) and labels (n,); UserError where they are not finite."""
    if not logits.isfinite().all():
        raise UserError("the logits of the network are not finite: the training diverged, lower optim.lr or task.lr")
    return top_scores(top_hits(logits, labels))
