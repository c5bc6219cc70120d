"""Image classification with the metric on the logits: the training step, and one run.

Recipe: that of the release (in its history), which is CutMix's (arXiv 1905.04899): SGD with Nesterov's momentum, steps
of a tenth, crops and flips, and a part of the batches mixed by mixup or CutMix. The metric acts in training alone.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from idml.config import IDMLConfig
from idml.data import evaluation_batches
from idml.model import build_classification_network
from idml.module import decay, parameters_of
from shared.data.augment import Augmentation, mix
from shared.data.images import Batches, ImageSet, keyed_subset, load_image_set
from shared.data.keyed import keyed_uniform, stream
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.metrics.scores import top_hits, top_scores
from shared.training.checks import autocast_context
from shared.training.fit import TrainingData, seconds_of_training
from shared.training.guard import GuardedModule
from shared.training.ranks import world_size
from shared.training.validation import Validation

MIXED = stream("idml.mixed")
MIXING = stream("idml.mixing")


class ClassificationModule(GuardedModule):
    """Trains a classifier by cross-entropy on soft targets."""

    def __init__(self, network: nn.Module, cfg: IDMLConfig, steps_per_epoch: int):
        super().__init__()
        self.model, self.steps_per_epoch = network, steps_per_epoch
        self.optim, self.objective, self.classes, self.seed = (cfg.optim, cfg.objective, cfg.data.classes, cfg.seed)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.last_loss = loss = self.loss(batch, batch_idx)
        self.log_dict({"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"]}, prog_bar=True)
        return loss

    def loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss, 0-d, of this rank's part of a batch: images (B, 3, H, W), labels (B,) int64."""
        mixed = float(keyed_uniform(MIXED, self.seed, step)) < self.objective.mixed_batches
        images, targets = mix(
            batch["images"],
            batch["labels"],
            # The same key on every rank: one draw for the whole batch.
            key=(MIXING, self.seed, step),
            mixup_alpha=(self.objective.mixup_alpha or 0.0) if mixed else 0.0,
            cutmix_alpha=(self.objective.cutmix_alpha or 0.0) if mixed else 0.0,
            switch_probability=0.5,
            smoothing=0.0,
            classes=self.classes,
        )
        logits = self.model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets.to(logits.dtype), reduction="none")  # (B,)
        # The sum over all ranks by their common count; DistributedDataParallel averages, which this undoes.
        return losses.sum() * world_size() / self.optim.batch_size

    def configure_optimizers(self):
        optim = self.optim
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            nesterov=True,
            weight_decay=optim.weight_decay,
        )

        def factor(step: int) -> float:
            return decay(step / self.steps_per_epoch, optim)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def require_selection(cfg: IDMLConfig) -> None:
    """Raise UserError for another epoch than the last: classification holds no class out."""
    if cfg.selection != "last-epoch":
        raise UserError(f"selection={cfg.selection} is not one of classification: set last-epoch")


def prepare(cfg: IDMLConfig) -> tuple[ClassificationModule, TrainingData, ImageSet]:
    """Return all that a run trains with, and its test images; raises UserError for bad input."""
    images = load_image_set(cfg.data.manifest, "train", cfg.paths.data_root)
    test = load_image_set(cfg.data.manifest, "test", cfg.paths.data_root)
    chosen = None
    if cfg.data.train_images is not None:
        chosen = keyed_subset(images.labels, cfg.data.train_images, cfg.seed)
    batches = Batches(images, Augmentation(cfg.augment), cfg.seed, chosen=chosen)
    sampler = KeyedBatchSampler(len(batches), cfg.optim.batch_size, cfg.seed, 1)
    sampler.steps = cfg.scale.epochs * (len(batches) // cfg.optim.batch_size)
    mixes = bool(cfg.objective.mixup_alpha or cfg.objective.cutmix_alpha)
    data = TrainingData(batches, sampler, mixes, cfg.trainer.workers)
    torch.manual_seed(cfg.seed)
    network = build_classification_network(cfg)
    return ClassificationModule(network, cfg, sampler.steps // cfg.scale.epochs), data, test


@torch.no_grad()
def score(cfg: IDMLConfig, network: nn.Module, test: ImageSet, device: torch.device) -> dict[str, float]:
    """Return top1, top5 (fractions) and ``n_test`` over all test images, by the logits without the metric.

    UserError where the logits are not finite: such scores would be those of no network.
    """
    network = network.to(device).eval()
    hits = []
    for batch in DataLoader(evaluation_batches(cfg, test), batch_size=None, num_workers=cfg.trainer.workers):
        with autocast_context(cfg, device):
            logits = network(batch["images"].to(device, next(network.parameters()).dtype))
        if not logits.isfinite().all():
            raise UserError("the outputs of the network are not finite: the training diverged, lower optim.lr")
        hits.append(top_hits(logits.cpu(), batch["labels"]))
    return top_scores(torch.cat(hits)) | {"n_test": float(sum(map(len, hits)))}


def run(cfg: IDMLConfig, folder: Path, fit: Callable) -> dict | None:
    """Train (by ``fit`` of train.py) and score one row and seed; returns the metrics (None on ranks other than 0)."""
    module, data, test = prepare(cfg)
    begin = time.perf_counter()
    validation = Validation(cfg, evaluation_batches(cfg, test), data.sampler)
    trainer = fit(cfg, module, data, folder, [validation])
    seconds = time.perf_counter() - begin
    if not trainer.is_global_zero:
        return None
    metrics = score(cfg, module.model, test, trainer.strategy.root_device)
    metrics = metrics | validation.with_best({"": metrics})
    metrics["train_images"] = float(len(data.batches))
    metrics["train_seconds"] = seconds
    metrics["parameters"] = float(parameters_of(module.model))
    metrics |= module.step_counts()
    return metrics


def seconds_of_run(cfg: IDMLConfig) -> float:
    """Estimate the seconds of the training of a run from three timed steps."""
    module, data, _ = prepare(cfg)
    return seconds_of_training(cfg, module, data)
