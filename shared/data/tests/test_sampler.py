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


def test_repeated_augmentation_gives_views_of_fewer_samples_in_an_epoch_of_the_same_length():
    batches = list(KeyedBatchSampler(20, 4, seed=1, steps=10, repeats=3))  # 5 batches an epoch
    for epoch in (0, 1):
        drawn = [i for of, batch in batches if of == epoch for i in batch]
        samples = [i % 20 for i in drawn]
        assert len(drawn) == 20 and len(set(samples)) == 7  # six samples thrice, the seventh twice
        assert [i // 20 for i in drawn] == [0, 1, 2] * 6 + [0, 1]
        assert all(len(set(samples[at : at + 3])) == 1 for at in range(0, 18, 3))


def test_repeated_augmentation_resumes_and_is_shared_by_ranks():
    one = list(KeyedBatchSampler(23, 6, seed=4, steps=9, repeats=3))
    parts = [list(KeyedBatchSampler(23, 6, 4, 9, rank, 2, repeats=3)) for rank in range(2)]
    assert [
        [i for pair in zip(*(p[1] for p in step), strict=True) for i in pair] for step in zip(*parts, strict=True)
    ] == [batch for _, batch in one]
    resumed = KeyedBatchSampler(23, 6, seed=4, steps=9, repeats=3)
    resumed.resume_at(5)
    assert list(resumed) == one[5:]
