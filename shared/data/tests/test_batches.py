"""Subsets and batches of an image set: functions of the seed, whatever the workers and the company of an image."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from shared.data.augment import Augmentation, AugmentationConfig
from shared.data.images import ArrayImages, Batches, OrderedBatches, keyed_subset
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError

AUGMENT = AugmentationConfig(
    image_size=8,
    crop="pad",
    scale=None,
    ratio=None,
    padding=1,
    flip=0.5,
    color_jitter=0.3,
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.25,
    interpolation="bicubic",
    mean=[0.5, 0.5, 0.5],
    std=[0.25, 0.25, 0.25],
    eval_crop_ratio=1.0,
)


@pytest.fixture
def part() -> ArrayImages:
    """Twelve noisy images of three classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), np.uint8)
    return ArrayImages(("ape", "bee", "cat"), np.repeat(np.arange(3), 4), pixels)


def test_a_subset_is_balanced_part_of_every_larger_one_and_a_function_of_the_seed():
    labels = np.repeat([2, 0, 1], [5, 40, 40])
    subsets = [keyed_subset(labels, count, seed=1) for count in range(1, 86)]
    for count, subset in enumerate(subsets, 1):
        assert len(subset) == count and np.array_equal(subset, np.unique(subset))
        numbers = np.bincount(labels[subset], minlength=3)
        assert abs(numbers[0] - numbers[1]) <= 1 and numbers[2] >= min(5, numbers[0] - 1)
    assert all(set(small) <= set(large) for small, large in zip(subsets, subsets[1:], strict=False))
    assert keyed_subset(labels, 6, seed=1).tolist() == [1, 2, 8, 29, 69, 70]  # on every machine
    assert not np.array_equal(keyed_subset(labels, 30, seed=1), keyed_subset(labels, 30, seed=2))


@pytest.mark.parametrize("count", [0, 4])
def test_a_subset_larger_than_the_set_or_empty_is_refused(count):
    with pytest.raises(UserError, match=f"{count} images out of 3"):
        keyed_subset(np.array([0, 1, 1]), count, seed=0)


def test_batches_are_the_same_for_every_number_of_workers(part):
    def batches(workers):
        data = Batches(part, Augmentation(AUGMENT), seed=2)
        sampler = KeyedBatchSampler(len(data), 4, seed=2, steps=5)
        return list(DataLoader(data, sampler=sampler, batch_size=None, num_workers=workers))

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one["images"].shape == (4, 3, 8, 8) and one["images"].dtype == torch.float32
        assert all(torch.equal(one[key], other[key]) for key in ("images", "labels", "indices"))


def test_an_image_of_a_subset_is_augmented_as_in_the_whole_set(part):
    augmentation = Augmentation(AUGMENT)
    whole = Batches(part, augmentation, seed=2)[(7, range(12))]
    subset = Batches(part, augmentation, seed=2, chosen=np.array([1, 5, 8]))
    batch = subset[(7, [2, 0])]
    assert len(subset) == 3 and batch["indices"].tolist() == [8, 1] and batch["labels"].tolist() == [2, 0]
    assert torch.equal(batch["images"], whole["images"][[8, 1]])


def test_a_sample_beyond_the_length_is_a_further_view(part):
    batches = Batches(part, Augmentation(AUGMENT), seed=2)
    batch = batches[(0, [3, 15, 27])]
    assert batch["indices"].tolist() == [3, 3, 3] and batch["labels"].tolist() == [0, 0, 0]
    first, second, third = batch["images"]
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert torch.equal(batches[(0, [15])]["images"][0], second)


def test_test_batches_do_not_depend_on_the_epoch_and_may_be_empty(part):
    batches = Batches(part, Augmentation(AUGMENT), seed=2, train=False)
    images = batches[(0, [4, 0])]["images"]
    assert torch.equal(images, batches[(5, [4, 0])]["images"])
    assert torch.allclose(images * 63.75 + 127.5, part.batch(np.array([4, 0])).float(), atol=1e-4)  # of 255
    assert batches[(0, [])]["images"].shape == (0, 3, 8, 8)


class Broken:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise UserError("train/ape/3.png is cut short: copy it again")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence_from_a_worker_too(workers):
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Broken(), batch_size=None, num_workers=workers)))
    assert str(caught.value) == "train/ape/3.png is cut short: copy it again"


@pytest.mark.parametrize(("at_most", "sizes"), [(None, [5, 5, 2]), (7, [5, 2]), (5, [5]), (99, [5, 5, 2])])
def test_ordered_batches_hold_every_sample_once_and_end_with_what_is_left(part, at_most, sizes):
    batches = Batches(part, Augmentation(AUGMENT), seed=2, train=False, chosen=np.arange(12)[::-1])
    ordered = OrderedBatches(batches, 5, at_most)
    batches = [batch["indices"].tolist() for batch in ordered]
    assert [len(batch) for batch in batches] == sizes and len(ordered) == len(sizes) and ordered.samples == sum(sizes)
    assert [index for batch in batches for index in batch] == list(range(11, 11 - sum(sizes), -1))
    with pytest.raises(IndexError):
        ordered[-1]
