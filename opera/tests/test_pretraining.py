"""A pre-training on the digits: its schedules, its resumption, what a step that is not finite leaves, and bad input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opera import train
from opera.data import seen_labels
from opera.hierarchy import ARRANGEMENTS
from opera.schedules import learning_rate, momentum
from opera.tests.small import BATCHES_AN_EPOCH, small_config
from shared.errors import RunInterrupted, UserError
from shared.training.fit import fit


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Ends the run before batch ``step``: by an exception, or with signal 9."""

    def __init__(self, step: int, hard: bool):
        self.step, self.hard = step, hard

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.hard:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed


def pretrain(folder: Path, every: int, kill: pl.Callback | None = None) -> dict:
    """Pre-train for two epochs and return every tensor: weights, statistics, the momentum encoder."""
    torch.set_num_threads(1)
    cfg = small_config(folder, f"output.checkpoint_every={every}", epochs=2)
    module, data = train.prepare(cfg)
    fit(cfg, module, data, folder, [kill] if kill else [])
    return module.state_dict()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("unbroken"), every=1000)


def assert_same(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(("every", "kill"), [(4, 6), (11, 13)])
def test_resume_is_bit_identical_past_the_next_epoch_border(tmp_path, unbroken, every, kill):
    with pytest.raises(Killed):
        pretrain(tmp_path, every, Kill(kill, hard=False))
    assert_same(pretrain(tmp_path, every), unbroken)


@pytest.mark.slow
def test_resume_after_kill_9_is_bit_identical(tmp_path, unbroken):
    code = (
        "import sys; from pathlib import Path; from opera.tests.test_pretraining import Kill, pretrain; "
        "pretrain(Path(sys.argv[1]), 4, Kill(14, hard=True))"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    assert_same(pretrain(tmp_path, 4), unbroken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_own_code_and_the_run_goes_on(tmp_path, unbroken, number, code, caplog):
    class Signal(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                os.kill(os.getpid(), number)

    # As at a terminal: behind a shell's & Ctrl-C is ignored, and Lightning ignores further ones while it ends.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(RunInterrupted) as stopped:
            pretrain(tmp_path, 4, Signal())
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == code
    with caplog.at_level("INFO", "shared.training.checkpoints"):
        assert_same(pretrain(tmp_path, 4), unbroken)
    assert f"continues after step 4 of {2 * BATCHES_AN_EPOCH}" in caplog.text


def test_the_momentum_encoder_follows_the_weights_after_every_update(tmp_path):
    cfg = small_config(tmp_path)
    module, data = train.prepare(cfg)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append([p.clone() for p in module.model.momentum.parameters()])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            kept = momentum(batch_idx + 1, BATCHES_AN_EPOCH, cfg.objective.momentum)
            ours = module.model.online.parameters()
            for before, now, online in zip(seen[-1], module.model.momentum.parameters(), ours, strict=True):
                torch.testing.assert_close(now, kept * before + (1 - kept) * online)

    fit(cfg, module, data, tmp_path, [Watch()])
    assert len(seen) == BATCHES_AN_EPOCH


def test_step_that_is_not_finite_changes_neither_weights_nor_statistics_nor_momentum_encoder(tmp_path):
    cfg = small_config(tmp_path)
    module, data = train.prepare(cfg)
    views, states = module.views, []

    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.views = (lambda *arguments: views(*arguments) * torch.inf) if batch_idx == 2 else views

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx < 4:
                moments = [v.clone() for one in trainer.optimizers[0].state.values() for v in one.values()]
                states.append([*(value.clone() for value in module.state_dict().values()), *moments])

    fit(cfg, module, data, tmp_path, [Poison()])
    _, before, after, following = states
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and module.skipped_steps == 1
    assert not all(torch.equal(a, b) for a, b in zip(after, following, strict=True))


def test_schedules_are_those_of_moco_v3():
    assert [learning_rate(step, 10, 4) for step in (0, 2, 4, 7, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [momentum(step, 10, 0.99) for step in (0, 5, 10)] == pytest.approx([0.99, 0.995, 1.0])


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_run_gives_the_scores_of_probe_and_neighbours_and_the_conflict_where_there_is_one(tmp_path, arrangement):
    metrics = train.run(small_config(tmp_path, f"objective.arrangement={arrangement}"), tmp_path / "run")
    # Two epochs of a probe on one of pre-training tell little; neighbours need no training.
    assert 0 < metrics["top1"] <= metrics["top5"] <= 1 and metrics["top1_knn"] > 0.5
    assert metrics["n_test"] == 359 and metrics["skipped_steps"] == 0
    assert ("gradient_cosine" in metrics) == (arrangement not in ("instance", "supervised", "supcon"))


def test_the_conflict_is_measured_on_batches_of_all_classes(tmp_path):
    cfg = small_config(tmp_path)
    module, data = train.prepare(cfg)
    labels = data.batches.labels[data.batches.chosen]
    by_class = labels.argsort(kind="stable")  # the order of most sets
    data.batches.chosen, labels = data.batches.chosen[by_class], labels[by_class]
    batches = train.conflict_batches(data, cfg.scale.epochs)
    assert len(batches) == min(train.CONFLICT_BATCHES, BATCHES_AN_EPOCH)
    samples = np.concatenate([samples for _, samples in batches])
    assert len(np.unique(samples)) == len(samples)
    for epoch, samples in batches:
        assert epoch == cfg.scale.epochs and len(samples) == min(cfg.optim.batch_size, train.CONFLICT_IMAGES)
        assert np.bincount(labels[samples]).max() < 0.3 * len(samples)  # of ten classes


def test_rows_that_pretrain_alike_share_a_pretraining_and_others_do_not(tmp_path):
    cfg, other = small_config(tmp_path), small_config(tmp_path, "task.epochs=3")
    assert train.pretraining_folder(cfg) == train.pretraining_folder(other)
    third = small_config(tmp_path, "objective.momentum=0.9")
    assert train.pretraining_folder(cfg) != train.pretraining_folder(third)


def test_a_part_of_every_class_is_labelled_and_a_larger_part_holds_it():
    labels = np.repeat(np.arange(4), 10)
    some, more = seen_labels(labels, 0.2, 0), seen_labels(labels, 0.8, 0)
    assert [int((some == label).sum()) for label in range(4)] == [2] * 4
    assert (more[some >= 0] == some[some >= 0]).all() and (some[some >= 0] == labels[some >= 0]).all()
    assert (seen_labels(labels, 1.0, 0) == labels).all() and (seen_labels(labels, 0.0, 0) == -1).all()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.labelled=0"], "needs labels and data.labelled=0.0 leaves none"),
        (["data.labelled=1.5"], "data.labelled=1.5 is no part"),
        (["optim.batch_size=5000"], "do not fill one batch"),
        (["scale.epochs=0"], "scale.epochs=0 trains nothing"),
        (["task.kind=guess"], "task.kind=guess"),
        (["task.sets=[]"], "and a set or more"),
        (["model.backbone=vgg"], "model.backbone=vgg is unknown"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, overrides, words):
    cfg = small_config(tmp_path, *overrides)
    with pytest.raises(UserError, match=words) as error:
        train.check(cfg)
        train.prepare(cfg)
    assert "\n" not in str(error.value)
