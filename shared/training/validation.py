"""Validation: top-1 and top-5 of a network, and of the average of its weights, by the test set after every n-th epoch.

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

BEST_EPOCH, SCORES = {"": "best_epoch", "_average": "average_best_epoch"}, ("top1", "top5")


@torch.no_grad()
def top_scores(cfg, network: nn.Module, batches: OrderedBatches, device: torch.device) -> dict[str, float]:
    """Return SCORES over all test images, fractions, of which every rank scores a part; not finite is wrong."""
    modes, dtype = {part: part.training for part in network.modules()}, next(network.parameters()).dtype
    mine, sums = range(rank(), len(batches), world_size()), torch.zeros(3, dtype=torch.int64, device=device)
    options = {"num_workers": cfg.trainer.workers, "generator": torch.Generator().manual_seed(0)}
    network.eval()
    for batch in DataLoader(Subset(batches, mine), batch_size=None, **options):
        with autocast_context(cfg, device):
            logits = network(batch["images"].to(device, dtype))
        hits = top_hits(logits, batch["labels"].to(device)) & logits.isfinite().all(1, keepdim=True)
        sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), torch.tensor(len(hits), device=device)])
    for part, mode in modes.items():
        part.training = mode
    *right, scored = sum_over_ranks(sums).tolist()
    return {name: count / scored for name, count in zip(SCORES, right, strict=True)}


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
        self.curves: dict[str, dict[float, dict[str, float]]] = {of: {} for of in BEST_EPOCH}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        epoch, inside = divmod(batch_idx + 1, self.steps_per_epoch)
        if inside or epoch not in self.epochs:
            return
        for of, network in (("", pl_module.model), ("_average", getattr(pl_module, "average", None))):
            if network is not None:
                self.curves[of][epoch] = top_scores(self.cfg, network, self.batches, pl_module.device)

    def with_best(self, last: dict[str, dict[str, float]]) -> dict[str, float]:
        """Return SCORES of the last epoch and, where others are scored, of the best by top-1, the first of equals."""
        metrics = {f"{name}{of}": last[of][name] for of in last for name in SCORES}
        for of in last if self.cfg.output.validate_every else ():
            curve = self.curves[of] | {self.steps / self.steps_per_epoch: last[of]}
            metrics[BEST_EPOCH[of]] = float(best := max(curve, key=lambda epoch: curve[epoch]["top1"]))
            metrics |= {f"{name}{of}_best": curve[best][name] for name in SCORES}
        return metrics

    def state_dict(self) -> dict:
        return {"curves": self.curves}

    def load_state_dict(self, state: dict) -> None:
        self.curves = state["curves"]
