"""A step that is not finite changes nothing, and a training of too many of them stops."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from shared.errors import UserError
from shared.records import is_diverged
from shared.training.guard import ENOUGH_STEPS, MOST_IN_A_ROW, GuardedModule

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


class Counting(GuardedModule):
    """One weight; the loss is not finite in the steps of ``bad``."""

    def __init__(self, bad):
        super().__init__()
        self.weight, self.bad = torch.nn.Parameter(torch.ones(())), set(bad)

    def training_step(self, batch, batch_idx):
        self.last_loss = loss = self.weight * (torch.nan if batch_idx in self.bad else 1.0)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


def count(bad, steps: int) -> Counting:
    module = Counting(bad)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(torch.zeros(steps, 1), batch_size=None))
    module.require_convergence(trainer.optimizers[0])
    return module


def test_steps_that_are_not_finite_in_a_row_stop_the_training(tmp_path):
    assert count(range(20, 20 + MOST_IN_A_ROW - 1), 400).skipped_steps == MOST_IN_A_ROW - 1
    with pytest.raises(UserError) as error:
        count(range(3, 100), 400)
    assert "diverged: 10 of 13 steps" in str(error.value) and "the last 10 in a row" in str(error.value)
    assert "at step 13 and learning rate 0.25; there is no good checkpoint: lower optim.lr" in str(error.value)


def test_a_share_of_steps_that_are_not_finite_stops_the_training_once_there_are_enough(tmp_path):
    every_tenth = range(0, 400, 10)
    with pytest.raises(UserError, match=f"diverged: 21 of {ENOUGH_STEPS + 1} steps"):
        count(every_tenth, 400)
    assert count(range(0, 400, 25), 400).skipped_steps == 16  # 4 %
    assert count([0], 3).skipped_steps == 1  # one in any


def test_a_short_training_of_which_most_was_skipped_is_no_result_at_its_end():
    # 44 steps, as in a demo; never ten in a row, and too few for a share to stop it before
    with pytest.raises(UserError, match="diverged: 39 of 44 steps"):
        count([step for step in range(44) if step % 9], 44)


def test_what_may_be_skipped():
    assert [is_diverged(skipped, 100) for skipped in (0, 1, 5, 6)] == [False, False, False, True]
    assert not is_diverged(1, 1) and is_diverged(2, 3) and is_diverged(39, 44)


def test_the_counts_survive_a_checkpoint():
    checkpoint = {"global_step": 13}
    before, after = Counting(()), Counting(())
    before.skipped_steps, before.skipped_in_a_row = 4, 2
    before.on_save_checkpoint(checkpoint)
    after.on_load_checkpoint(checkpoint)
    assert after.step_counts() == {"steps_trained": 13, "skipped_steps": 4} and after.skipped_in_a_row == 2
