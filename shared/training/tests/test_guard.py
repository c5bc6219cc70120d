"""A step that is not finite changes nothing."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from shared.training.guard import GuardedModule

STEPS, BAD_STEP = 5, 2


class Small(GuardedModule):
    """A network with batch normalisation, momentum and a schedule; ``poison`` says how step 2 goes wrong."""

    def __init__(self, poison: str):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        self.poison, self.states = poison, []

    def training_step(self, batch, batch_idx):
        x = batch
        if batch_idx == BAD_STEP and self.poison == "input":
            x = x * torch.inf
        loss = self.network(x).square().mean()
        if batch_idx == BAD_STEP and self.poison == "loss":
            loss = loss + torch.nan
        if batch_idx == BAD_STEP and self.poison == "gradient":
            # finite loss, infinite gradient: the square root of 0
            loss = loss + (self.network[2].bias - self.network[2].bias).abs().sqrt().sum()
        self.last_loss = loss
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.optimizers().optimizer
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        values = [*self.state_dict().values(), *moments, torch.tensor(optimizer.param_groups[0]["lr"])]
        self.states.append([value.clone() for value in values])


def train(poison: str, **options) -> Small:
    module = Small(poison)
    data = torch.randn(STEPS, 8, 3, generator=torch.Generator().manual_seed(3))
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return module


@pytest.mark.parametrize("poison", ["loss", "input", "gradient"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_statistics_nor_optimiser_nor_schedule(poison):
    module = train(poison)
    before, after = module.states[BAD_STEP - 1], module.states[BAD_STEP]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert module.skipped_steps == 1
    following = module.states[BAD_STEP + 1]
    assert not all(torch.equal(a, b) for a, b in zip(after, following, strict=True))
    assert all(torch.isfinite(value).all() for value in following)


def test_finite_steps_are_all_taken():
    assert train("nothing").skipped_steps == 0


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_skipped_step_goes_with_clipped_gradients(algorithm):
    module = train("gradient", gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)
    assert module.skipped_steps == 1
