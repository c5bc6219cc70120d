"""The resampled scene: no training-half spectrum reaches a scored patch, and mixing stays in the window."""

from types import SimpleNamespace

import numpy as np
import pytest

from pdml.patches import PatchSource
from pdml.resample import halve, mixing_weights, pixel_sides, resample_scene
from pdml.splits import Split, make_split
from shared.data.keyed import keyed_bits, keyed_uniform
from shared.errors import UserError

# Mixing weights are float64 sums of 18 terms; the cube is stored in float32.
WEIGHT_TOLERANCE, CUBE_TOLERANCE = 1e-12, 1e-6
CLASSES, BANDS, SIGMA, PATCH = 3, 10, 0.5, 5


@pytest.fixture(params=["percent", "disjoint"])
def scene(request):
    row, column = np.ix_(np.arange(42), np.arange(45))
    labels = (keyed_bits(90, row // 7, column // 6) % np.uint64(CLASSES)).astype(np.int16) + 1
    labels[keyed_bits(91, row, column) % np.uint64(4) == 0] = 0
    spectra_labels = np.repeat([1, 2, 3], [15, 10, 8])
    spectra = keyed_uniform(92, np.arange(33)[:, None], np.arange(BANDS)[None])
    options = SimpleNamespace(kind=request.param, amount=5, minimum=3, block=20, assignments=50)
    split = make_split(labels, CLASSES, options, 4, PATCH, "labels")
    side = pixel_sides(labels, split, "regions" if request.param == "disjoint" else "pixels", PATCH)
    return SimpleNamespace(labels=labels, split=split, side=side, spectra=spectra, spectra_labels=spectra_labels)


def mixed(scene, noise=0.0, seed=4, spectra=None):
    spectra = scene.spectra if spectra is None else spectra
    return resample_scene(scene.labels, scene.side, spectra, scene.spectra_labels, SIGMA, noise, seed)


def test_no_training_pixel_holds_a_test_half_spectrum_and_no_scored_pixel_a_training_half_one(scene):
    half = halve(scene.spectra_labels, 4)
    used = mixed(scene)[2].toarray() > 0  # (H W, spectra)
    assert not used[scene.split.train.ravel()][:, half == 1].any()
    assert not used[scene.split.test.ravel()][:, half == 0].any()
    assert not used[:, half == -1].any()


@pytest.mark.parametrize("scene", ["disjoint"], indirect=True)
def test_no_patch_that_decides_a_scored_pixel_of_a_disjoint_split_holds_a_training_half_spectrum(scene):
    half = halve(scene.spectra_labels, 4)
    used = mixed(scene)[2].toarray() > 0
    source = PatchSource(np.zeros((*scene.labels.shape, 1), np.uint8), PATCH)
    everywhere = source.positions(*np.indices(scene.labels.shape).reshape(2, -1)).reshape(-1, PATCH**2)
    covering = np.isin(everywhere, np.flatnonzero(scene.split.test)).any(1)  # their pixels are fused, or are the centre
    assert covering.sum() > scene.split.test.sum() > 50
    assert not used[np.unique(everywhere[covering])][:, half == 0].any()
    # Pixels that neither train nor are scored nor lie in such a patch draw from the half of their block.
    free = np.setdiff1d(np.arange(scene.labels.size), everywhere[covering])
    free = free[~scene.split.train.ravel()[free]]
    assert (scene.labels.ravel()[free] == 0).any()
    assert np.array_equal(used[free][:, half == 1].any(1), scene.split.blocks.ravel()[free] == 1)


@pytest.mark.parametrize("scene", ["percent"], indirect=True)
def test_without_blocks_other_pixels_follow_the_rule_that_is_named(scene):
    some = scene.split.test & (np.indices(scene.labels.shape)[0] < 20)  # rows below 20 are scored, no other
    split = Split(scene.split.train & ~some & (np.indices(scene.labels.shape)[0] > 30), some, scene.split.classes)
    assert not pixel_sides(scene.labels, split, "pixels", PATCH)[~some].any()
    regions = pixel_sides(scene.labels, split, "regions", PATCH)
    assert regions[:19][~split.train[:19]].all() and not regions[33:].any()


@pytest.mark.parametrize("scene", ["disjoint"], indirect=True)
@pytest.mark.parametrize(("rule", "sentence"), [("pixels", "set data.resample.sides to regions"), ("x", "set pixels")])
def test_a_rule_that_leaks_or_is_unknown_is_refused(scene, rule, sentence):
    with pytest.raises(UserError, match=sentence):
        pixel_sides(scene.labels, scene.split, rule, PATCH)


def test_changing_test_half_spectra_leaves_training_pixels_bit_identical(scene):
    changed = scene.spectra + (halve(scene.spectra_labels, 4) == 1)[:, None]
    before, after = mixed(scene, 0.01)[0], mixed(scene, 0.01, spectra=changed)[0]
    assert np.array_equal(before[scene.split.train], after[scene.split.train])
    assert (before[scene.split.test] != after[scene.split.test]).any(1).all()


def test_halves_are_equal_disjoint_and_drawn_by_seed(scene):
    half = halve(scene.spectra_labels, 4)
    for number, size in ((1, 7), (2, 5), (3, 4)):
        own = half[scene.spectra_labels == number]
        assert ((own == 0).sum(), (own == 1).sum()) == (size, size)
    assert not np.array_equal(half, halve(scene.spectra_labels, 5))


def test_a_pixel_mixes_only_the_classes_of_its_window_with_weights_that_sum_to_one(scene):
    labels = np.where(scene.labels > 0, scene.labels, 1)  # labelled throughout: windows can be read off
    mixing = mixing_weights(labels, scene.side, scene.spectra_labels, halve(scene.spectra_labels, 4), SIGMA, 4)
    assert np.allclose(mixing.sum(1), 1, rtol=0, atol=WEIGHT_TOLERANCE)
    shares = mixing @ np.eye(CLASSES)[scene.spectra_labels - 1]
    gauss = np.exp(-np.add.outer([1, 0, 1], [1, 0, 1]) / (2 * SIGMA**2))
    gauss /= gauss.sum()
    padded = np.pad(labels, 1, mode="edge")
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            window = padded[row : row + 3, column : column + 3]
            expected = [gauss[window == number].sum() for number in range(1, CLASSES + 1)]
            assert np.allclose(shares[row * labels.shape[1] + column], expected, atol=WEIGHT_TOLERANCE)


def test_unlabelled_pixels_take_the_class_of_the_nearest_labelled_one():
    labels = np.zeros((3, 30), np.int16)
    labels[1, 2], labels[1, 27] = 1, 2
    spectra_labels = np.array([1, 1, 2, 2])
    abundances = resample_scene(labels, np.zeros(labels.shape, np.int8), np.eye(4), spectra_labels, SIGMA, 0.0, 0)[1]
    assert (abundances[:, :13, 0] > 1 - CUBE_TOLERANCE).all() and (abundances[:, 17:, 1] > 1 - CUBE_TOLERANCE).all()


def test_cube_is_mixing_times_spectra_plus_noise_of_the_given_deviation(scene):
    cube, abundances, mixing = mixed(scene)
    assert np.allclose(cube.reshape(-1, BANDS), mixing @ scene.spectra, atol=CUBE_TOLERANCE)
    assert np.allclose(abundances.sum(2), 1, atol=CUBE_TOLERANCE)
    noise = mixed(scene, 0.25)[0] - cube
    assert abs(noise.std() / 0.25 - 1) < 0.03 and abs(noise.mean()) < 0.01  # 18,900 draws: five deviations and more


def test_scene_depends_on_the_seed_and_on_nothing_else(scene):
    assert np.array_equal(mixed(scene, 0.1)[0], mixed(scene, 0.1)[0])
    assert not np.array_equal(mixed(scene, 0.1)[0], mixed(scene, 0.1, seed=5)[0])
