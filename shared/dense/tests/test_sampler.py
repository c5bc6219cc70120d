"""Batches of images that are alike in aspect: mmdet's rule as a function of (seed, epoch), whatever the ranks."""

import numpy as np
import pytest

from shared.data.keyed import keyed_permutation
from shared.dense.data import PairedBatchSampler
from shared.dense.tests.small import installed
from shared.errors import UserError

LENGTH, BATCH, GROUP = 102, 16, 2
WIDE = np.arange(LENGTH) * 7919 % 10 < 6  # 61 are: one of either kind is left over


def sampler(steps: int = 12, seed: int = 3, **options) -> PairedBatchSampler:
    return PairedBatchSampler(WIDE, GROUP, batch_size=BATCH, seed=seed, steps=steps, **options)


def groups_of(batch: list[int], group: int = GROUP) -> list[list[int]]:
    """Return the groups of a batch: image g + k G is in group g of G."""
    count = len(batch) // group
    return [batch[first::count] for first in range(count)]


def test_an_epoch_has_every_image_at_most_once_and_all_but_the_last_batch():
    batches = list(sampler())
    an_epoch = LENGTH // BATCH
    for epoch in range(2):
        images = [image for which, batch in batches[epoch * an_epoch : (epoch + 1) * an_epoch] for image in batch]
        assert {which for which, _ in batches[epoch * an_epoch : (epoch + 1) * an_epoch]} == {epoch}
        assert len(images) == len(set(images)) == an_epoch * BATCH


def test_the_images_of_a_group_are_all_wide_or_all_tall_but_for_one_rest():
    for seed in range(20):
        order = sampler(seed=seed).order(0)
        assert sorted(order) == list(range(LENGTH))
        mixed = [
            group
            for start in range(0, LENGTH // BATCH * BATCH, BATCH)
            for group in groups_of(list(order[start : start + BATCH]))
            if len({bool(WIDE[image]) for image in group}) > 1
        ]
        assert len(mixed) <= 1


def test_batches_are_a_function_of_the_seed_and_the_epoch():
    first, second = sampler().order(0), sampler().order(1)
    assert sampler().order(0).tolist() == first.tolist() != second.tolist()
    assert sampler(seed=4).order(0).tolist() != first.tolist()
    resumed = sampler()
    resumed.resume_at(7)
    assert list(resumed) == list(sampler())[7:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batch_of_one_process_and_no_group_is_cut(ranks):
    parts = [list(sampler(rank=rank, world_size=ranks)) for rank in range(ranks)]
    for step, (epoch, batch) in enumerate(sampler()):
        whole = {tuple(group) for group in groups_of(batch)}
        shared = [part[step] for part in parts]
        assert {which for which, _ in shared} == {epoch}
        assert {tuple(group) for _, images in shared for group in groups_of(images)} == whole
        assert sorted(image for _, images in shared for image in images) == sorted(batch)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("group", [2, 4])
def test_groups_are_those_of_mmdets_own_sampler_on_the_same_order(group):
    from shared.dense.libraries import detection

    detection()
    from mmdet.datasets.samplers import AspectRatioBatchSampler
    from torch.utils.data import Sampler

    sizes = [(4, 3) if wide else (3, 4) for wide in WIDE]
    sizes[:10] = [(3, 3)] * 10  # mmdet counts squares as wide
    is_wide = np.array([width >= height for width, height in sizes])

    class Images:
        def get_data_info(self, index: int) -> dict:
            return {"width": sizes[index][0], "height": sizes[index][1]}

    class Ordered(Sampler):
        dataset = Images()

        def __iter__(self):
            return iter(keyed_permutation(LENGTH, 3, 0).tolist())

    expected = [tuple(batch) for batch in AspectRatioBatchSampler(Ordered(), group)]
    ours = PairedBatchSampler(is_wide, group, batch_size=group, seed=3, steps=1).order(0).tolist()
    assert [tuple(ours[start : start + group]) for start in range(0, LENGTH, group)] == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 103, "steps": 1}, "102 training samples do not fill one batch of 103: lower optim.batch_size"),
        ({"batch_size": 0, "steps": 1}, "1 steps of 0 samples: set scale.steps and optim.batch_size to 1 or more"),
        ({"batch_size": 2, "steps": 1, "world_size": 4}, "a batch of 2 cannot be shared by 4 ranks: use fewer ranks"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        PairedBatchSampler(WIDE, GROUP, seed=0, **options)
