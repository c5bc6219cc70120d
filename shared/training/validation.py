"""Validation: the top-1 of a network, and of the average of its weights, on the test set after every n-th epoch.

It changes nothing of a training, neither modes nor statistics nor torch's generators, and so is no part of the hash.
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from shared.data.images import OrderedBatches
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.metrics.scores import top_hits
from shared.training.checks import autocast_context
from shared.training.ranks import rank, sum_over_ranks, world_size

BEST_EPOCH = {"top1": "best_epoch", "top1_average": "average_best_epoch"}


@torch.no_grad()
def top1(cfg, network: nn.Module, batches: OrderedBatches, device: torch.device) -> float:
    """Return the top-1 over all test images, a fraction, of which every rank scores a part; not finite is wrong."""
    modes, dtype = {part: part.training for part in network.modules()}, next(network.parameters()).dtype
    mine, sums = range(rank(), len(batches), world_size()), torch.zeros(2, dtype=torch.int64, device=device)
    options = {"num_workers": cfg.trainer.workers, "generator": torch.Generator().manual_seed(0)}
    network.eval()
    for batch in DataLoader(Subset(batches, mine), batch_size=None, **options):
        with autocast_context(cfg, device):
            logits = network(batch["images"].to(device, dtype))
        hits = top_hits(logits, batch["labels"].to(device), 1)[:, 0] & logits.isfinite().all(1)
        sums += torch.stack([hits.sum(), torch.tensor(len(hits), device=device)])
    for part, mode in modes.items():
        part.training = mode
    right, scored = sum_over_ranks(sums).tolist()
    return right / scored


class Validation(pl.Callback):
    """Scores ``model``, and ``average`` where there is one, of a module after every ``output.validate_every``-th epoch.

    The last epoch is left to whoever scores the trained network. Stands before the callback that saves checkpoints,
    which then hold what was scored. ``epochs``: those that are scored, from 1. UserError for a number below 1.
    """

    def __init__(self, cfg, batches: OrderedBatches, sampler: KeyedBatchSampler):
        every, self.cfg, self.batches = cfg.output.validate_every, cfg, batches
        if every is not None and every < 1:
            raise UserError(f"output.validate_every={every}: set 1 or more epochs, or null for none")
        self.steps, self.steps_per_epoch = sampler.steps, sampler.length // sampler.batch_size
        self.epochs = range(every, -(-self.steps // self.steps_per_epoch), every) if every else range(0)
        self.curves: dict[str, dict[float, float]] = {name: {} for name in BEST_EPOCH}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        epoch, inside = divmod(batch_idx + 1, self.steps_per_epoch)
        if inside or epoch not in self.epochs:
            return
        for name, network in (("top1", pl_module.model), ("top1_average", getattr(pl_module, "average", None))):
            if network is not None:
                self.curves[name][epoch] = top1(self.cfg, network, self.batches, pl_module.device)

    def with_best(self, last: dict[str, float]) -> dict[str, float]:
        """Return the last scores and, where other epochs are scored, the best, the first of equals, with its epoch."""
        metrics = dict(last)
        for name in last if self.cfg.output.validate_every else ():
            curve = self.curves[name] | {self.steps / self.steps_per_epoch: last[name]}
            metrics[BEST_EPOCH[name]] = float(best := max(curve, key=curve.get))
            metrics[f"{name}_best"] = curve[best]
        return metrics

    def state_dict(self) -> dict:
        return {"curves": self.curves}

    def load_state_dict(self, state: dict) -> None:
        self.curves = state["curves"]
