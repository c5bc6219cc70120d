"""The sampler that resumption and ranks rest on."""

import pytest

from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError


def test_an_epoch_visits_each_sample_at_most_once_and_epochs_differ():
    batches = list(KeyedBatchSampler(10, 3, seed=0, steps=6))
    first, second = ([i for of, batch in batches if of == epoch for i in batch] for epoch in (0, 1))
    assert len(first) == len(set(first)) == len(second) == len(set(second)) == 9
    assert first != second


@pytest.mark.parametrize("consumed", [0, 1, 4, 5, 6, 11, 12])
def test_resuming_skips_exactly_the_consumed_batches(consumed):
    whole = list(KeyedBatchSampler(20, 4, seed=1, steps=12))  # 5 batches an epoch
    resumed = KeyedBatchSampler(20, 4, seed=1, steps=12)
    resumed.resume_at(consumed)
    assert list(resumed) == whole[consumed:]
    assert len(resumed) == 12  # Lightning counts the consumed ones itself


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_of_one_process(ranks):
    one = list(KeyedBatchSampler(23, 5, seed=4, steps=9))
    parts = [list(KeyedBatchSampler(23, 5, 4, 9, rank, ranks)) for rank in range(ranks)]
    for index, (epoch, batch) in enumerate(one):
        assert sorted(i for part in parts for i in part[index][1]) == sorted(batch)
        assert {part[index][0] for part in parts} == {epoch}


def test_too_few_samples_or_too_many_ranks_are_refused():
    with pytest.raises(UserError, match="batch_size"):
        KeyedBatchSampler(3, 4, seed=0, steps=1)
    with pytest.raises(UserError, match="ranks"):
        KeyedBatchSampler(8, 2, seed=0, steps=1, world_size=3)
