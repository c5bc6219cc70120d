"""The sampler that resumption and ranks rest on."""

import numpy as np
import pytest

from shared.data.sampler import ClassBalancedBatchSampler, KeyedBatchSampler
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


LABELS = np.array([0, 1, 2, 0, 0, 1, 2, 0, 0, 2, 2])  # five, two and four samples


def test_balanced_batches_hold_groups_of_a_class_and_an_epoch_holds_every_sample():
    sampler = ClassBalancedBatchSampler(LABELS, batch_size=4, per_class=2, seed=1, steps=6)
    batches = list(sampler)
    assert sampler.length == 6 + 2 + 4  # the odd class has a sample twice
    for _, batch in batches:
        classes, counts = np.unique(LABELS[np.array(batch) % len(LABELS)], return_counts=True)
        assert len(batch) == 4 and set(counts) <= {2, 4}
    for epoch in (0, 1):
        seen = [index for number, batch in batches for index in batch if number == epoch]
        # The one that comes twice comes as another view.
        assert len(set(seen)) == 12 and {index % len(LABELS) for index in seen} == set(range(len(LABELS)))
        assert sum(index >= len(LABELS) for index in seen) == 1
    assert batches[:3] != [(0, batch) for _, batch in batches[3:]]


@pytest.mark.parametrize("size", [60, 120])
@pytest.mark.parametrize("of_a_class", [5, 40])
def test_where_a_sample_stands_in_a_balanced_batch_says_nothing_of_its_class(size, of_a_class):
    labels = np.repeat(np.arange(4000 // of_a_class), of_a_class)
    kept, chance = [], []
    for _, batch in ClassBalancedBatchSampler(labels, size, 4, 0, 20):
        first = labels[np.array(batch) % len(labels)]
        same = (first[:, None] == first) & ~np.eye(size, dtype=bool)
        second = np.roll(first, size // 2)
        kept.append((same & (second[:, None] == second)).sum() / same.sum())
        chance.append(same.mean())
    # Of two of a class the partners, half a batch away, are of one class as often as any two are.
    assert np.mean(kept) < 2 * np.mean(chance)


def test_balanced_batches_resume_and_are_shared_by_ranks():
    whole = list(ClassBalancedBatchSampler(LABELS, 4, 2, 1, 6))
    resumed = ClassBalancedBatchSampler(LABELS, 4, 2, 1, 6)
    resumed.resume_at(4)
    assert list(resumed) == whole[4:]
    parts = []
    for rank in range(2):
        sampler = ClassBalancedBatchSampler(LABELS, 4, 2, 1, 6)
        sampler.rank, sampler.world_size = rank, 2
        parts.append([batch for _, batch in sampler])
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for _, batch in whole]


@pytest.mark.parametrize("batch_size, per_class", [(4, 3), (4, 4), (4, 0)])
def test_a_batch_that_cannot_be_balanced_is_refused(batch_size, per_class):
    with pytest.raises(UserError, match="set optim.batch_size to a multiple of data.per_class"):
        ClassBalancedBatchSampler(LABELS, batch_size, per_class, 0, 1)
