"""Class-balanced batches: groups of a class, every sample once an epoch, resumption, ranks."""

import numpy as np
import pytest

from idml.sampler import ClassBalancedBatchSampler
from shared.errors import UserError

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
