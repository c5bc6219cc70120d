"""Scores during a training: when they are taken, which one is the best, and that the training does not notice."""

from io import BytesIO

import pytest
import torch
from torch import nn

from shared.data.sampler import KeyedBatchSampler
from shared.dense.validation import DenseValidation
from shared.errors import UserError


class Module:
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).train()
        self.model[1].eval()


def sampler(steps: int) -> KeyedBatchSampler:
    """Return a sampler with four steps an epoch."""
    return KeyedBatchSampler(8, 2, seed=0, steps=steps)


def validated(every, steps: int, epochs, scores: list[float]) -> tuple[DenseValidation, list[tuple[int, bool]]]:
    """Return a callback after all steps, and the steps at which it scored, with whether that was the last one."""
    taken, module, now = [], Module(), 0

    def score(model, is_last: bool) -> dict[str, float]:
        model.eval()
        taken.append((now, is_last))
        return {"miou": scores[len(taken) - 1], "n_test": 5.0}

    validation = DenseValidation(every, sampler(steps), epochs, score)
    for now in range(1, steps + 1):
        validation.on_train_batch_end(None, module, None, None, now - 1)
        assert [part.training for part in module.model.modules()] == [True, True, False]
    return validation, taken


def test_every_epoch_and_the_last_are_scored_and_the_best_stands_beside_the_last():
    validation, taken = validated(1, 12, 3.0, [0.2, 0.4, 0.3])
    assert taken == [(4, False), (8, False), (12, True)]
    assert validation.with_best() == {"miou": 0.3, "n_test": 5.0, "best_epoch": 2.0, "miou_best": 0.4}


def test_of_equal_scores_the_first_epoch_is_the_best():
    assert validated(1, 12, 3.0, [0.4, 0.4, 0.4])[0].with_best()["best_epoch"] == 1.0


def test_a_length_in_steps_is_scored_in_tenths():
    validation, taken = validated(2, 50, None, [0.1, 0.5, 0.3, 0.2, 0.4])
    assert [step for step, _ in taken] == [10, 20, 30, 40, 50] and validation.with_best()["best_epoch"] == 20 / 4


def test_without_validation_the_end_alone_is_scored():
    validation, taken = validated(None, 12, 3.0, [0.3])
    assert taken == [(12, True)] and validation.with_best() == {"miou": 0.3, "n_test": 5.0}


def test_a_checkpoint_keeps_what_was_scored():
    validation, _ = validated(1, 12, 3.0, [0.2, 0.4, 0.3])
    torch.save(validation.state_dict(), file := BytesIO())
    file.seek(0)
    again = DenseValidation(1, sampler(12), 3.0, None)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.with_best() == validation.with_best()


def test_a_number_below_one_is_refused():
    with pytest.raises(UserError, match="output.validate_every=0: set 1 or more epochs, or null for none"):
        DenseValidation(0, sampler(12), 3.0, None)
