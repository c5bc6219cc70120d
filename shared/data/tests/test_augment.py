"""Augmentation: the same for the same key, what timm and torchvision would do, and clear words for bad values."""

import dataclasses
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision.transforms.v2.functional as transforms
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup

from shared.data.augment import CROP, RAND_AUGMENT, Augmentation, AugmentationConfig, crop_boxes, erased_boxes, mix
from shared.data.keyed import keyed_bits, keyed_uniform
from shared.errors import UserError

# The keys below are fixed, so a test gives one p-value for ever; a true generator fails 1 key in 1000.
LOWEST_P_VALUE = 1e-3
# float32 arithmetic in another order.
ROUNDING = 1e-5
# torchvision's resizing of tensors and Pillow's round differently: one level of 255, seen through std 0.2.
LEVEL = 1.01 / 255 / 0.2

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIMPLE = AugmentationConfig(
    image_size=32,
    crop="pad",
    scale=None,
    ratio=None,
    padding=4,
    flip=0.5,
    color_jitter=0.0,
    rand_augment=None,
    random_erasing=0.0,
    interpolation="bicubic",
    mean=list(MEAN),
    std=list(STD),
    eval_crop_ratio=1.0,
)
FULL = dataclasses.replace(
    SIMPLE,
    crop="random-resized",
    scale=[0.08, 1.0],
    ratio=[3 / 4, 4 / 3],
    padding=None,
    color_jitter=0.3,
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.25,
    eval_crop_ratio=0.875,
)
PLAIN = dataclasses.replace(SIMPLE, padding=0, flip=0.0)


def pictures(count, size=32):
    """Return smooth random images, uint8 (count, 3, size, size)."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    return (fine * 255).to(torch.uint8)


def key(count, epoch=0, view=0, seed=3, first=0):
    return seed, epoch, np.arange(first, first + count), np.full(count, view)


def levels(batch):
    """Return a normalised batch as the uint8 images that it came from."""
    values = batch * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (values * 255).round().to(torch.uint8)


# Keys


@pytest.mark.parametrize("cfg", [SIMPLE, FULL], ids=["simple", "full"])
def test_an_image_is_augmented_alike_alone_and_in_any_batch(cfg):
    augmentation, images = Augmentation(cfg), pictures(24)
    batch = augmentation.train(images, key(24))
    assert batch.shape == (24, 3, 32, 32) and batch.dtype == torch.float32
    assert torch.equal(augmentation.train(images, key(24)), batch)
    assert torch.equal(augmentation.train(list(images), key(24)), batch)
    for index in range(24):
        assert torch.equal(augmentation.train(images[index : index + 1], key(1, first=index))[0], batch[index])


@pytest.mark.parametrize("cfg", [SIMPLE, FULL], ids=["simple", "full"])
def test_another_seed_epoch_or_view_is_another_augmentation(cfg):
    augmentation, images = Augmentation(cfg), pictures(16)
    keys = [key(16), key(16, epoch=1), key(16, view=1), key(16, seed=4)]
    batches = [augmentation.train(images, each) for each in keys]
    for one in range(len(batches)):
        for other in range(one):
            assert (batches[one] != batches[other]).flatten(1).any(1).float().mean() > 0.9


def test_the_global_generators_and_the_images_stay_as_they_were():
    images = pictures(8)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state(), images.clone()
    Augmentation(FULL).train(images, key(8))
    Augmentation(SIMPLE).train(images, key(8))
    Augmentation(PLAIN).train(images, key(8))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1][1]) and np.random.get_state()[2] == before[1][2]
    assert torch.equal(torch.get_rng_state(), before[2]) and torch.equal(images, before[3])


# What is done to an image


def test_without_any_augmentation_the_images_are_normalised_as_by_torchvision():
    images = pictures(4)
    expected = transforms.normalize(images.float() / 255, list(MEAN), list(STD))
    assert torch.allclose(Augmentation(PLAIN).train(images, key(4)), expected, atol=ROUNDING)
    assert torch.allclose(Augmentation(PLAIN).evaluate(images), expected, atol=ROUNDING)


def test_padded_crops_are_windows_of_the_padded_image_all_of_them_alike():
    cfg = dataclasses.replace(SIMPLE, image_size=8, padding=1)
    image = torch.randperm(192, generator=torch.Generator().manual_seed(0)).to(torch.uint8).view(3, 8, 8) + 1
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    windows = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    windows = torch.stack([*windows, *(window.flip(-1) for window in windows)]).flatten(1)  # (18, 192)
    batch = levels(Augmentation(cfg).train(image.expand(3600, 3, 8, 8), key(3600))).flatten(1)
    matches = torch.stack([(batch == window).all(1) for window in windows])  # (18, 3600)
    assert (matches.sum(0) == 1).all()
    assert scipy.stats.chisquare(matches.sum(1).numpy()).pvalue > LOWEST_P_VALUE


def test_resized_crops_are_those_of_torchvision_for_the_drawn_box():
    cfg = dataclasses.replace(FULL, flip=0.0, color_jitter=0.0, rand_augment=None, random_erasing=0.0)
    images = [pictures(1, 40)[0], pictures(1, 64)[0, :, :50]]
    batch = Augmentation(cfg).train(images, key(2))
    for index, image in enumerate(images):
        draws = keyed_uniform(CROP, 3, 0, index, 0, np.arange(10)[:, None], np.arange(4))
        sides = ([side] for side in image.shape[1:])
        top, left, height, width = crop_boxes(*sides, cfg.scale, cfg.ratio, draws[None])[0].tolist()
        part = transforms.resized_crop(image, top, left, height, width, [32, 32], "bicubic", antialias=True)
        assert torch.equal(levels(batch[index : index + 1])[0], part)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (100, 160), (37, 20), (1, 1), (2, 300)])
def test_crop_boxes_lie_inside_the_image_with_the_area_and_shape_asked_for(height, width):
    draws = keyed_uniform(0, np.arange(500)[:, None, None], np.arange(10)[:, None], np.arange(4))
    boxes = crop_boxes([height] * 500, [width] * 500, (0.2, 0.8), (0.5, 2.0), draws)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
    if min(height, width) == 100:  # where rounding to pixels and the fallback do not matter
        areas = boxes[:, 2] * boxes[:, 3] / (height * width)
        shapes = boxes[:, 3] / boxes[:, 2]
        assert areas.min() > 0.19 and areas.max() < 0.82 and areas.max() - areas.min() > 0.5
        assert shapes.min() > 0.48 and shapes.max() < 2.07


def test_boxes_of_a_batch_are_those_of_the_definition_image_by_image():
    draws = keyed_uniform(1, np.arange(400)[:, None, None], np.arange(10)[:, None], np.arange(4))
    sizes = np.array([(100, 100), (37, 20), (1, 1), (300, 9)] * 100)
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(*sizes.T, scale, ratio, draws).tolist()
    fallbacks = 0
    for (height, width), attempts, box in zip(sizes.tolist(), draws.tolist(), boxes, strict=True):
        for area, shape, down, right in attempts:
            pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area)
            logarithms = [math.log(one) for one in ratio]
            shape = math.exp(logarithms[0] + (logarithms[1] - logarithms[0]) * shape)
            wide, high = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            if 0 < wide <= width and 0 < high <= height:
                assert box == [int(down * (height - high + 1)), int(right * (width - wide + 1)), high, wide]
                break
        else:
            fallbacks += 1
            assert box == {(300, 9): [144, 0, 12, 9], (37, 20): [5, 0, 27, 20]}[height, width]
    assert 10 < fallbacks < 200


def test_a_shape_that_never_fits_gives_the_middle_as_torchvision_does():
    draws = np.full((2, 10, 4), 0.5)
    boxes = crop_boxes([10, 100], [100, 10], (0.9, 1.0), (0.75, 4 / 3), draws)
    assert boxes.tolist() == [[0, 43, 10, 13], [43, 0, 13, 10]]


def test_rand_augment_is_that_of_timm_with_the_seeds_of_the_key():
    cfg = dataclasses.replace(PLAIN, rand_augment="rand-m5-mstd0.5-inc1")
    images = pictures(12)
    batch = levels(Augmentation(cfg).train(images, key(12)))
    hints = {"translate_const": 14, "img_mean": (102, 128, 153), "interpolation": Image.BICUBIC}
    peer = rand_augment_transform("rand-m5-mstd0.5-inc1", hints)
    changed = 0
    for index, seed in enumerate(keyed_bits(RAND_AUGMENT, *key(12)).tolist()):
        random.seed(seed)
        np.random.seed(seed >> 32)
        picture = np.array(peer(Image.fromarray(images[index].permute(1, 2, 0).numpy().copy())))
        assert np.array_equal(batch[index].permute(1, 2, 0).numpy(), picture)
        changed += not torch.equal(batch[index], images[index])
    assert changed >= 4


def test_posterize_to_no_bits_is_black_and_no_error():
    augmentation = Augmentation(dataclasses.replace(PLAIN, rand_augment="rand-m10-inc1"))
    (posterize,) = [op for op in augmentation.rand_augment.ops if op.name.startswith("Posterize")]
    posterize.prob = 1.0
    picture = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    assert np.array(posterize(picture)).max() == 0  # magnitude 10 of 10 keeps 4 - 4 bits


def test_colour_jitter_scales_brightness_within_its_range():
    cfg = dataclasses.replace(PLAIN, color_jitter=0.3)
    grey = torch.full((400, 3, 32, 32), 100, dtype=torch.uint8)  # has neither contrast nor saturation to change
    batch = levels(Augmentation(cfg).train(grey, key(400))).float()
    assert torch.equal(batch, batch[:, :1, :1, :1].expand_as(batch))
    factors = (batch[:, 0, 0, 0] / 100 - 0.7) / 0.6
    assert scipy.stats.kstest(factors.numpy(), "uniform").pvalue > LOWEST_P_VALUE


def test_erasing_fills_a_rectangle_with_normal_noise_as_often_as_asked():
    cfg = dataclasses.replace(PLAIN, random_erasing=0.25)
    images = pictures(400)
    changed = Augmentation(cfg).train(images, key(400)) != Augmentation(PLAIN).train(images, key(400))
    erased = changed.all(1)  # (400, 32, 32)
    assert torch.equal(changed.any(1), erased)
    some = erased.flatten(1).any(1)
    assert scipy.stats.binomtest(int(some.sum()), 400, 0.25).pvalue > LOWEST_P_VALUE
    for mask in erased[some]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    noise = Augmentation(cfg).train(images, key(400))[changed]
    assert scipy.stats.kstest(noise[:5000].numpy(), "norm").pvalue > LOWEST_P_VALUE


def test_erased_boxes_have_the_areas_of_the_recipe_and_may_not_fit():
    draws = keyed_uniform(0, np.arange(500)[:, None, None], np.arange(10)[:, None], np.arange(4))
    boxes = erased_boxes(224, draws)
    for attempts, box in zip(draws[:50].tolist(), boxes.tolist(), strict=False):  # by the definition, each
        for area, shape, down, right in attempts:
            pixels = 224 * 224 * (0.02 + (1 / 3 - 0.02) * area)
            shape = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * shape)
            high, wide = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            if high < 224 and wide < 224:
                assert box == [int(down * (224 - high + 1)), int(right * (224 - wide + 1)), high, wide]
                break
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 224).all()
    areas = boxes[:, 2] * boxes[:, 3] / 224**2
    assert areas.min() > 0.019 and areas.max() < 0.337 and areas.mean() == pytest.approx(0.17, abs=0.02)
    assert not erased_boxes(1, draws).any()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_test_images_are_those_of_timm(interpolation):
    cfg = dataclasses.replace(FULL, interpolation=interpolation)
    peer = create_transform(32, interpolation=interpolation, mean=MEAN, std=STD, crop_pct=0.875)
    image = pictures(1, 64)[0, :, :50]
    expected = peer(Image.fromarray(image.permute(1, 2, 0).numpy().copy()))
    for images in (image[None], [image]):
        (batch,) = Augmentation(cfg).evaluate(images)
        assert (batch - expected).abs().max() <= LEVEL


def test_small_images_are_enlarged_before_padding():
    batch = Augmentation(dataclasses.replace(PLAIN, image_size=16)).train(pictures(3, 8), key(3))
    expected = transforms.resize(pictures(3, 8), [16, 16], "bicubic", antialias=True)
    assert torch.equal(levels(batch), expected)


@pytest.mark.parametrize("cfg", [SIMPLE, FULL], ids=["simple", "full"])
def test_no_images_give_an_empty_batch(cfg):
    for images in (pictures(2)[:0], []):
        assert Augmentation(cfg).train(images, key(0)).shape == (0, 3, 32, 32)
        assert Augmentation(cfg).evaluate(images).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("crop", "centre"),
        ("interpolation", "nearest"),
        ("flip", 1.5),
        ("random_erasing", -0.1),
        ("color_jitter", 2.0),
        ("mean", [0.5]),
        ("std", [0.2, 0.0, 0.2]),
        ("eval_crop_ratio", 0.0),
        ("scale", [0.5, 0.1]),
        ("scale", None),
        ("ratio", [0.0, 1.0]),
        ("rand_augment", "auto-m9"),
        ("rand_augment", "rand-q9"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"augment\.{field} = "):
        Augmentation(dataclasses.replace(FULL, **{field: value}))


def test_padding_needs_a_number_and_square_images_of_one_size():
    with pytest.raises(UserError, match=r"augment\.padding = None"):
        Augmentation(dataclasses.replace(SIMPLE, padding=None))
    for images in (pictures(2)[:, :, :20], [pictures(1)[0], pictures(1, 40)[0]]):
        with pytest.raises(UserError, match="square images of one size.*random-resized"):
            Augmentation(SIMPLE).train(images, key(2))


# Mixing a batch

SETTINGS = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_probability": 0.5, "smoothing": 0.1, "classes": 5}


def batch_of(count):
    return torch.randn(count, 3, 12, 10, generator=torch.Generator().manual_seed(1)), torch.arange(count) % 5


@pytest.mark.parametrize("step", range(4))
def test_mixup_of_a_pair_is_that_of_timm_for_the_drawn_share(step, monkeypatch):
    images, labels = batch_of(2)  # rolling a pair by half is reversing it, which timm does
    mixed, soft = mix(images, labels, (0, step), **{**SETTINGS, "cutmix_alpha": 0.0})
    share = float((soft[0, 0] - 0.02) / 0.9)
    peer = Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(peer, "_params_per_batch", lambda: (share, False))
    expected, target = peer(images.clone(), labels)
    assert torch.allclose(mixed, expected, atol=ROUNDING) and torch.allclose(soft, target, atol=ROUNDING)


def test_cutmix_replaces_one_rectangle_and_labels_tell_its_share():
    images, labels = batch_of(6)
    shares = []
    for step in range(50):
        mixed, soft = mix(images, labels, (0, step), **{**SETTINGS, "mixup_alpha": 0.0, "smoothing": 0.0})
        partner = images.roll(3, 0)
        replaced = (mixed != images).any(1).any(0)
        assert torch.equal(mixed, torch.where(replaced, partner, images))
        rows, columns = replaced.any(1).sum(), replaced.any(0).sum()
        assert replaced.sum() == rows * columns
        one_hot = torch.eye(5)[labels]
        share = 1 - float(replaced.float().mean())
        assert torch.allclose(soft, share * one_hot + (1 - share) * one_hot.roll(3, 0), atol=ROUNDING)
        shares.append(share)
    assert min(shares) < 0.4 and max(shares) > 0.9


def test_the_shares_follow_the_beta_distribution_and_switch_as_often_as_asked():
    images, labels = torch.zeros(2, 3, 1, 1), torch.tensor([0, 1])
    soft = [mix(images, labels, (1, step), 0.8, 0.0, 0.5, 0.0, 2)[1][0, 0].item() for step in range(2000)]
    assert scipy.stats.kstest(soft, "beta", (0.8, 0.8)).pvalue > LOWEST_P_VALUE
    images, labels = batch_of(2)
    cut = 0
    for step in range(400):
        mixed = mix(images, labels, (2, step), **SETTINGS)[0]
        cut += bool(((mixed == images) | (mixed == images.flip(0))).all())
    assert scipy.stats.binomtest(cut, 400, 0.5).pvalue > LOWEST_P_VALUE


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_mix_as_one_process_does(ranks):
    images, labels = batch_of(16)
    for step in range(6):
        whole = mix(images, labels, (5, step), **SETTINGS)
        for rank in range(ranks):
            part = mix(images[rank::ranks], labels[rank::ranks], (5, step), **SETTINGS)
            assert torch.equal(part[0], whole[0][rank::ranks]) and torch.equal(part[1], whole[1][rank::ranks])


def test_without_alphas_only_the_labels_are_smoothed():
    images, labels = batch_of(5)
    mixed, soft = mix(images, labels, (0, 0), 0.0, 0.0, 0.5, 0.1, 5)
    assert torch.equal(mixed, images)
    assert torch.allclose(soft, torch.eye(5)[labels] * 0.9 + 0.02, atol=ROUNDING)


@pytest.mark.parametrize("count", [1, 3])
def test_mixing_keeps_the_inputs_and_takes_odd_batches(count):
    images, labels = batch_of(count)
    before = images.clone(), labels.clone()
    for step in range(6):
        mixed, soft = mix(images, labels, (0, step), **SETTINGS)
        assert mixed.shape == images.shape and math.isclose(float(soft.sum()), count, rel_tol=ROUNDING)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
