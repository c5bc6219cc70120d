"""The training step of a detector or a segmenter: the library's losses, our optimiser, schedule and ranks.

The losses of a detector are divided by numbers that depend on all images of a device: mmdet's recipes count images per
GPU. ``dense.optim.group`` says how many images share such a number; the loss of a batch is the mean over its groups,
and a group draws its samples by a key. So a recipe gives the same numbers on any number of devices. A segmenter's
losses are means over pixels: without a group, all images of a rank are one.
"""

import torch
from torch import Tensor, nn

from shared.data.keyed import keyed_bits, stream
from shared.errors import UserError
from shared.training.guard import GuardedModule
from shared.training.ranks import rank, world_size

STEP = stream("dense.step")
OPTIMIZERS = ("adamw", "sgd")
GAMMA = 0.1  # of a rate behind a milestone


def rate_of(step: int, steps: int, epochs: float | None, schedule) -> float:
    """Return the factor of the learning rate at a step, as mmengine's LinearLR, MultiStepLR and PolyLR give it.

    A line from ``warmup_start`` to 1 over ``warmup_steps``; with ``milestones``, in epochs, a tenth behind each, and
    otherwise a polynomial of ``power`` from the end of the warm-up down to ``end``.
    """
    warmup = schedule.warmup_steps
    line = 1.0
    if step < warmup - 1:
        line = schedule.warmup_start + (1 - schedule.warmup_start) * step / (warmup - 1)
    if schedule.milestones:
        # Milestones are whole epochs of whole steps.
        passed = sum(step >= round(milestone * steps / epochs) for milestone in schedule.milestones)
        return line * GAMMA**passed
    done = max(step - warmup, 0) / max(steps - warmup - 1, 1)
    return line * (schedule.end + (1 - schedule.end) * (1 - min(done, 1.0)) ** schedule.power)


def parameter_groups(model: nn.Module, optim) -> list[dict]:
    """Return the optimiser's groups: by the factor of the rate, and with or without weight decay.

    ``no_decay``: parts of names whose parameters are not decayed (mmengine's custom_keys). ``layer_decay`` below 1: the
    rate of the backbone's layer i of n is multiplied by layer_decay^(n - i), by its ``layers_above(name)``, as in BEiT.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, is_kept = 1.0, any(part in name for part in optim.no_decay)
        if optim.layer_decay != 1:
            is_kept |= parameter.dim() == 1
            if name.startswith("backbone."):
                factor = optim.layer_decay ** model.backbone.layers_above(name.removeprefix("backbone."))
        groups.setdefault((factor, is_kept), []).append(parameter)
    return [
        {"params": parameters, "lr": optim.lr * factor, "weight_decay": 0.0 if is_kept else optim.weight_decay}
        for (factor, is_kept), parameters in groups.items()
    ]


class DenseModule(GuardedModule):
    """Trains ``model``, mmdet's or mmseg's, on the batches of ``data.DenseBatches``."""

    rate_key = "dense.optim.lr"

    def __init__(self, model: nn.Module, cfg, steps: int):
        super().__init__()
        self.model, self.dense, self.seed, self.steps = model, cfg.dense, cfg.seed, steps

    def training_step(self, batch: dict[str, list], batch_idx: int) -> Tensor:
        self.last_loss = loss = self.loss(batch, batch_idx)
        self.log_dict({"loss": loss.detach(), "lr": self.optimizers().param_groups[0]["lr"]}, prog_bar=True)
        return loss

    def loss(self, batch: dict[str, list], step: int) -> Tensor:
        """Return the loss, 0-d, of this rank's part of a batch: "inputs", images, and "data_samples", their objects."""
        total = 0.0
        for number, members in self.groups_of(len(batch["inputs"])):
            part = {name: [values[i] for i in members] for name, values in batch.items()}
            # Samples of boxes, dropout and stochastic depth are drawn from torch's generator.
            torch.manual_seed(int(keyed_bits(STEP, self.seed, step, number)) >> 1)
            data = self.model.data_preprocessor(part, True)
            data["inputs"] = data["inputs"].to(next(self.model.parameters()).dtype)
            losses, _ = self.model.parse_losses(self.model(**data, mode="loss"))
            total = total + losses * len(members)
        # The sum over all ranks by their common count; DistributedDataParallel averages, which is undone here.
        return total * world_size() / self.dense.optim.batch_size

    def groups_of(self, count: int) -> list[tuple[int, list[int]]]:
        """Return number and members of the groups of this rank's ``count`` images; UserError where ranks cut them."""
        size, own = self.dense.optim.group, rank()
        if size is None:
            return [(own, list(range(count)))]
        # By the batch, not by who is there: one process estimates the cost of a run on several devices.
        ranks, all_groups = self.dense.optim.batch_size // count, self.dense.optim.batch_size // size
        if all_groups % ranks:
            raise UserError(
                f"{all_groups} groups of {size} images cannot be shared by {ranks} ranks: use a number of ranks that "
                "divides them"
            )
        mine = all_groups // ranks  # this rank has images own, own + ranks, ... of the batch, in this order
        return [(own + ranks * first, list(range(first, count, mine))) for first in range(mine)]

    def configure_optimizers(self):
        optim = self.dense.optim
        groups = parameter_groups(self.model, optim)
        if optim.name == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=optim.lr, foreach=True)
        elif optim.name == "sgd":
            optimizer = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, foreach=True)
        else:
            raise UserError(f"dense.optim.name={optim.name} is unknown: choose one of {', '.join(OPTIMIZERS)}")

        def rate(step: int) -> float:
            return rate_of(step, self.steps, self.dense.epochs, self.dense.schedule)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
