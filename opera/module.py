"""The step of a pre-training: two views on the device, the objective, and the momentum encoder after the update."""

import torch
from torch import Tensor

from opera.config import OPERAConfig
from opera.hierarchy import Hierarchy, Terms
from opera.lars import LARS
from opera.schedules import learning_rate, momentum
from opera.views import Key, Views
from shared.data.keyed import keyed_bits, stream
from shared.errors import UserError
from shared.training.guard import GuardedModule

OPTIMIZERS = ("lars", "adamw", "sgd")
DROPPING = stream("opera.dropping")
BATCH = 256  # images that a learning rate refers to


def build_optimizer(name: str, parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return an optimiser with momentum 0.9; UserError for an unknown name."""
    if name == "lars":
        return LARS(parameters, lr, weight_decay, momentum=0.9)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)
    raise UserError(f"optim.name={name} is unknown: choose one of {', '.join(OPTIMIZERS)}")


class PretrainingModule(GuardedModule):
    """Trains a hierarchy of spaces on two views of every image."""

    def __init__(self, hierarchy: Hierarchy, views: Views, cfg: OPERAConfig, steps: int):
        super().__init__()
        # Convolutions run a third faster on channels that lie side by side.
        self.model, self.views = hierarchy.to(memory_format=torch.channels_last), views
        if cfg.output.compile:
            hierarchy.compile_encoders()
        self.optim, self.base_momentum, self.seed, self.steps = (cfg.optim, cfg.objective.momentum, cfg.seed, steps)
        self.warmup = round(steps * cfg.optim.warmup_epochs / cfg.scale.epochs)

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        # Stochastic depth draws from torch's generator: every rank for itself, every step as if never interrupted.
        torch.manual_seed(int(keyed_bits(DROPPING, self.seed, batch_idx, self.global_rank)) >> 1)

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device, dataloader_idx: int) -> dict[str, Tensor]:
        """Leave on the host what names the draws: asked for on the device, it would be waited for."""
        names = {name: batch[name] for name in ("epoch", "indices")}
        rest = {name: value for name, value in batch.items() if name not in names}
        return super().transfer_batch_to_device(rest, device, dataloader_idx) | names

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        terms = self.terms(batch)
        self.last_loss = terms.total
        shown = {name: value.detach() for name, value in terms._asdict().items()}
        self.log_dict(shown | {"lr": self.optimizers().param_groups[0]["lr"]}, prog_bar=True)
        return terms.total

    def terms(self, batch: dict[str, Tensor]) -> Terms:
        """Return the objective of all ranks' batch from this rank's part of it (``data.PretrainingBatches``)."""
        return self.model(*self.both_views(batch), batch["labels"], self.key(batch))

    def loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the objective alone, 0-d: what is timed to tell the cost of a run."""
        return self.terms(batch).total

    def key(self, batch: dict[str, Tensor]) -> Key:
        """Return what every draw of a batch is a function of."""
        return self.seed, int(batch["epoch"]), batch["indices"].cpu().numpy()

    @torch.no_grad()
    def both_views(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the two views, normalised, float32 (b, 3, S, S), made where the batch is."""
        key = self.key(batch)
        with torch.autocast(batch["labels"].device.type, enabled=False):
            if "images" in batch:
                made = [self.views(batch["images"], key, view) for view in (0, 1)]
            else:
                made = [
                    self.views.finished(batch[name].float() / 255, (*key, view))
                    for view, name in enumerate(("first", "second"))
                ]
        dtype = next(self.model.parameters()).dtype
        return [view.to(dtype, memory_format=torch.channels_last) for view in made]

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # MoCo-v3 moves the encoder inside the next step: the same weights, but our checkpoint holds the moved ones.
        if not self.step_was_skipped:
            self.model.update_momentum(momentum(batch_idx + 1, self.steps, self.base_momentum))

    def configure_optimizers(self):
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rate = self.optim.lr * self.optim.batch_size / BATCH
        optimizer = build_optimizer(self.optim.name, trained, rate, self.optim.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, self.steps, self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
