"""Draws by a key: the same whatever was drawn before, and nothing of them is left behind."""

import random

import numpy as np
import pytest
import torch

from shared.dense.draws import keyed_draws
from shared.dense.tests.small import STEPS, installed, small_config


def draw() -> tuple:
    return random.random(), np.random.random(), torch.rand(()).item()


def test_the_same_key_gives_the_same_draws_of_all_three_generators_and_another_key_others():
    with keyed_draws(1, 2, 3):
        first = draw()
    draw()
    with keyed_draws(1, 2, 3):
        again = draw()
    with keyed_draws(1, 2, 4):
        other = draw()
    assert first == again
    assert all(left != right for left, right in zip(first, other, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_generators_go_on_as_if_nothing_had_been_drawn_also_behind_an_error(fails):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = [draw(), draw()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    got = [draw()]
    with pytest.raises(ZeroDivisionError) if fails else keyed_draws(9), keyed_draws(7):
        draw()
        if fails:
            raise ZeroDivisionError
    got.append(draw())
    assert got == expected


def content(batches: list) -> list:
    """Return all that a network reads of batches, as bytes."""
    parts = []
    for batch in batches:
        parts.append([image.numpy().tobytes() for image in batch["inputs"]])
        for sample in batch["data_samples"]:
            if "gt_sem_seg" in sample:
                parts.append(sample.gt_sem_seg.data.numpy().tobytes())
            else:
                objects = sample.gt_instances
                parts.append((objects.bboxes.numpy().tobytes(), objects.masks.masks.tobytes(), sample.flip))
    return parts


@installed
@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_transforms_give_the_same_whatever_was_drawn_before_and_in_workers(kind, tmp_path):
    from shared.dense import data, run
    from shared.dense.model import config_of, library_of

    def batches(workers: int, seed: int = 0) -> list:
        cfg = small_config(kind, tmp_path, {"trainer.workers": workers, "seed": seed})
        library = library_of(cfg.dense)
        prepared = data.training_data(library, config_of(library, cfg.dense, (8, 8, 16, 16)), cfg, run.cache_of(cfg))
        return list(prepared.train_dataloader())

    first = content(batches(0))
    assert first != content(batches(0, seed=1))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert content(batches(0)) == first
    assert content(batches(2)) == first
