"""Validation: what it scores, on ranks too, what it keeps, and that it changes nothing of a training."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.testing.gloo import on_ranks
from shared.training.validation import Validation, top_scores

CPU = torch.device("cpu")


class Batches(list):
    """Three batches of unequal size: two ranks have unequal numbers of them."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        parts = [(size, torch.randn(size, 3, generator=draw)) for size in (4, 4, 3)]
        labels = torch.randint(5, (11,), generator=draw).split([4, 4, 3])
        super().__init__({"images": x, "labels": y} for (_, x), y in zip(parts, labels, strict=True))


def config(every: int | None = 1):
    return SimpleNamespace(
        trainer=SimpleNamespace(workers=0),
        optim=SimpleNamespace(precision="32-true"),
        output=SimpleNamespace(validate_every=every),
    )


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 5))


def score_on_rank(rank: int) -> dict[str, float]:
    return top_scores(config(), network(), Batches(), CPU)


def test_two_ranks_score_what_one_process_scores(tmp_path):
    model, batches = network().eval(), Batches()
    right = sum(int((model(b["images"]).argmax(1) == b["labels"]).sum()) for b in batches)
    assert 0 < right < 11
    expected = {"top1": right / 11, "top5": 1.0}  # of five classes
    assert on_ranks(2, score_on_rank, tmp_path) == [expected] * 2 == [score_on_rank(0)] * 2


def test_scoring_changes_neither_modes_nor_statistics_nor_the_generator():
    model = network().train()
    model[1].eval()  # frozen statistics
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    top_scores(config(), model, Batches(), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model] == [True, False, True, True] and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_outputs_that_are_not_finite_are_wrong():
    model, batches = nn.Linear(3, 5), Batches()
    nn.init.constant_(model.weight, torch.nan)
    assert top_scores(config(), model, batches, CPU) == {"top1": 0.0, "top5": 0.0}


def validation(every: int | None, epochs: float = 6) -> Validation:
    return Validation(config(every), Batches(), KeyedBatchSampler(8, 2, 0, round(4 * epochs)))


def test_every_nth_epoch_but_the_last_is_scored():
    for every, epochs, expected in ((1, 4, [1, 2, 3]), (2, 6, [2, 4]), (5, 4.5, []), (2, 4.5, [2, 4]), (None, 6, [])):
        assert list(validation(every, epochs).epochs) == expected


@pytest.mark.parametrize("every", [0, -1])
def test_an_impossible_number_of_epochs_is_refused(every):
    with pytest.raises(UserError, match=f"output.validate_every={every}: set 1 or more"):
        validation(every)


def top(score: float) -> dict[str, float]:
    """Return a top-5 that is best where the top-1 is worst: the epoch is chosen by the top-1."""
    return {"top1": score, "top5": 1.0 - score}


def test_weights_and_their_average_are_scored_after_an_epoch_alone(monkeypatch):
    seen, own = [], validation(2)

    def scored(cfg, network, *_):
        seen.append(network)
        return top(0.2 * len(seen))

    monkeypatch.setattr("shared.training.validation.top_scores", scored)
    module = SimpleNamespace(model="weights", average="average", device=CPU)
    for step in range(24):
        own.on_train_batch_end(None, module, None, None, step)
    assert seen == ["weights", "average"] * 2
    assert own.curves == {"": {2: top(0.2), 4: top(0.6000000000000001)}, "_average": {2: top(0.4), 4: top(0.8)}}
    again = validation(2)
    again.load_state_dict(own.state_dict())
    metrics = again.with_best({"": top(0.6000000000000001), "_average": top(0.5)})
    assert metrics["top1"] == metrics["top1_best"] and metrics["best_epoch"] == 4.0  # of equals the first
    assert metrics["top1_average"] == 0.5 and metrics["average_best_epoch"] == 4.0
    assert (metrics["top1_average_best"], metrics["top5_average_best"]) == (0.8, 1.0 - 0.8)
    assert again.with_best({"": top(0.8)}) == {
        "top1": 0.8,
        "top5": 1.0 - 0.8,
        "top1_best": 0.8,
        "top5_best": 1.0 - 0.8,
        "best_epoch": 6.0,
    }
    assert validation(None).with_best({"": top(0.8)}) == top(0.8)
