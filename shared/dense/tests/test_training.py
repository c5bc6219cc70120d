"""A training of a detector or a segmenter goes on where it ended, on any number of ranks, and steps over what is not
finite.
"""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shared.dense import run
from shared.dense.tests.small import STEPS, UPERNET, Tiny, installed, small_config
from shared.errors import UserError
from shared.testing.gloo import on_ranks

pytestmark = [installed, pytest.mark.slow]
NORMS = {"detection": nn.Identity, "segmentation": nn.BatchNorm2d}


class Stopped(Exception):
    pass


class Watch(pl.Callback):
    """Notes the loss of every step; ends a training by an exception before step ``stop``, spoils one at ``spoil``."""

    def __init__(self, stop: int | None = None, spoil: tuple[int, ...] = ()):
        self.stop, self.spoil, self.losses, self.weights = stop, spoil, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.stop:
            raise Stopped
        if batch_idx in self.spoil:
            batch["inputs"][0] = torch.full_like(batch["inputs"][0], float("inf"), dtype=torch.float32)
        self.weights.append({name: value.clone() for name, value in module.state_dict().items()})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(module.last_loss))


def train(kind: str, folder: Path, watch: Watch, changes: dict | None = None) -> dict[str, torch.Tensor]:
    """Train a small network; returns all its tensors, and the optimiser's."""
    torch.set_num_threads(1)
    cfg = small_config(kind, folder, {"output.checkpoint_every": 4, "dense.steps": 11} | (changes or {}))
    module, batches = run.prepare(cfg, Tiny(norm=NORMS[kind]))
    trainer = run.train(cfg, module, batches, folder / "row" / "seed0", [watch])
    state = {
        f"{number}.{name}": value
        for number, part in trainer.optimizers[0].state_dict()["state"].items()
        for name, value in part.items()
    }
    return module.state_dict() | state


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert torch.equal(left[name], value), name


@pytest.mark.parametrize("kind", STEPS)
def test_resume_after_a_stop_inside_an_epoch_and_past_its_border_is_bit_identical(kind, tmp_path):
    whole = Watch()
    unbroken = train(kind, tmp_path / "unbroken", whole)
    for stop in (6, 10):  # eight steps make an epoch
        with pytest.raises(Stopped):
            train(kind, tmp_path / "broken", Watch(stop))
        torch.rand(5)
    rest = Watch()
    assert_same(train(kind, tmp_path / "broken", rest), unbroken)
    assert rest.losses == whole.losses[8:] and len(rest.losses) == 3
    assert not torch.equal(unbroken["model.backbone.stages.0.0.weight"], Tiny().stages[0][0].weight)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_that_is_not_finite_changes_nothing(kind, tmp_path):
    watch = Watch(spoil=(2,))
    train(kind, tmp_path, watch, {"dense.steps": 4})
    assert_same(watch.weights[3], watch.weights[2])
    assert any(not torch.equal(value, watch.weights[2][name]) for name, value in watch.weights[1].items())


@pytest.mark.parametrize("kind", STEPS)
def test_a_training_without_finite_steps_ends_with_a_sentence(kind, tmp_path):
    sentence = "the training diverged: 10 of 10 steps had a loss or gradient that is not finite, .* dense.optim.lr$"
    with pytest.raises(UserError, match=sentence):
        train(kind, tmp_path, Watch(spoil=tuple(range(11))))


class Step(nn.Module):
    """The loss of a module as the forward of one, for DistributedDataParallel to wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch: dict, number: int):
        return self.module.loss(batch, number)


def train_on_rank(rank: int, ranks: int, kind: str, folder: str) -> dict[str, torch.Tensor]:
    """Train three steps by plain SGD in float64 as one of several ranks; returns the losses and the weights."""
    changes = {"dense.steps": 3, "optim.precision": "64-true"}
    if kind == "segmentation":
        # Every rank draws dropout for itself.
        off = {"model.decode_head.dropout_ratio": 0.0, "model.auxiliary_head.dropout_ratio": 0.0}
        changes["dense.changes"] = UPERNET["dense.changes"] | off
    cfg = small_config(kind, Path(folder), changes)
    module, batches = run.prepare(cfg, Tiny(norm=NORMS[kind]))
    module.double().train()
    batches.sampler.share(rank, ranks)
    step = Step(module)
    if ranks > 1:
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for number, batch in enumerate(batches.train_dataloader()):
        assert len(batch["inputs"]) == cfg.dense.optim.batch_size // ranks
        loss = step(batch, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | {name: value.detach() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", STEPS)
def test_two_ranks_equal_one_process(kind, tmp_path):
    # Float64; the ranks add the same numbers in another order.
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    single = train_on_rank(0, 1, kind, str(tmp_path))
    both = on_ranks(2, train_on_rank, tmp_path, 2, kind, str(tmp_path))
    assert len(set(single["losses"].tolist())) == 3
    mean = (both[0]["losses"] + both[1]["losses"]) / 2
    torch.testing.assert_close(mean, single["losses"], **tolerance)
    for ranks in both:
        for name in single.keys() - {"losses"}:
            torch.testing.assert_close(ranks[name], single[name], **tolerance, msg=name)
