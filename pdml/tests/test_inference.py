"""Streamed inference against the reference, and against the fusion written as a plain loop."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pdml.inference import predict_scene, predict_scene_convolutional, raster_batches
from pdml.normal import keyed_normal
from pdml.patches import PatchSource
from pdml.tools import reference
from pdml.tools.bench import build_bench_model, random_cube
from shared.errors import UserError

EQUAL = 1e-5  # the promise; float32 sums of up to 81 terms of size 1 in another order differ by about 1e-6
EXACT = 1e-12  # float64 sums of up to 81 terms of size 1
ROUNDED = 1.2e-7  # rounding of the maps to float32
SAME_MAP = 0.5  # correlation: a shifted or turned map of a random scene has about 0
NOISE = 1.1  # timing: other processes on the machine
CLASSES = 4
SCENES = [(12, 7, 5), (7, 12, 5), (5, 9, 9), (3, 20, 5), (11, 3, 3), (6, 6, 1)]  # height, width, patch


class RandomModel(nn.Module):
    """The model protocol with random weights: a term for the place in the patch, so that a shifted or turned
    patch shows, and batch statistics and dropout, so that a wrong mode shows."""

    def __init__(self, bands, patch_size, width=6, dense=True):
        super().__init__()
        self.patch_size, self.bands, self.width, self.dense = patch_size, bands, width, dense
        self.num_classes = CLASSES
        generator = torch.Generator().manual_seed(3)
        self.head = nn.Sequential(
            nn.Conv2d(bands, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.Dropout(), nn.Tanh()
        )
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.register_buffer("classes", torch.randn(CLASSES, width, generator=generator))
        self.register_buffer("place", torch.randn(2 * width, patch_size, patch_size, generator=generator))
        self.patches_seen = 0

    def encode(self, patches):
        self.patches_seen += len(patches)
        return (self.head(patches) + self.place).chunk(2, 1)

    def encode_centre(self, patches):
        radius = self.patch_size // 2
        return tuple(x[..., radius, radius] for x in self.encode(patches))

    def decide(self, mean, variance):
        distances = (mean[:, None] - self.classes).square() + variance[:, None]
        return torch.log_softmax(-distances.sum(2), 1)

    def uncertainty(self, mean, variance):
        return variance.log().mean(1)


def _cube(height, width, bands=3):
    return keyed_normal(5, np.arange(height * width * bands)).reshape(height, width, bands).astype(np.float32)


def _assert_equal(one, other, tolerance):
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=0, atol=tolerance)
    np.testing.assert_allclose(one.uncertainty, other.uncertainty, rtol=0, atol=tolerance)
    top = np.sort(other.probabilities, axis=2)
    sure = top[..., -1] - top[..., -2] > 2 * tolerance
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(one.prediction[sure], other.prediction[sure])


def _fuse_by_loop(model, cube):
    """Return the fused mean, variance (H, W, D) by visiting every pixel of every patch."""
    height, width, _ = cube.shape
    source, radius = PatchSource(cube, model.patch_size), model.patch_size // 2
    means = np.zeros((height, width, model.width))
    weights, count = np.zeros_like(means), np.zeros((height, width, 1))
    for row in range(height):
        for column in range(width):
            with torch.inference_mode():
                mean, log_variance = model.eval().encode(source.gather([row], [column]).double())
            for y in range(max(row - radius, 0), min(row + radius + 1, height)):
                for x in range(max(column - radius, 0), min(column + radius + 1, width)):
                    place = 0, slice(None), y - row + radius, x - column + radius
                    weight = np.exp(-log_variance[place].numpy())
                    means[y, x] += weight * mean[place].numpy()
                    weights[y, x] += weight
                    count[y, x] += 1
    return means / weights, count / weights


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
@pytest.mark.parametrize(("height", "width", "patch"), SCENES)
def test_streaming_equals_materialising_all_patches(height, width, patch, batch_size):
    model, cube = RandomModel(3, patch), _cube(height, width)
    streamed = predict_scene(model, cube, batch_size, probabilities=True)
    naive = reference.predict_scene(model, cube, probabilities=True)
    _assert_equal(streamed.centre, naive.centre, EQUAL)
    _assert_equal(streamed.fused, naive.fused, EQUAL)


@pytest.mark.parametrize(("height", "width", "patch"), SCENES)
def test_the_rolling_window_fuses_as_a_loop_over_every_pixel_of_every_patch_does(height, width, patch):
    model, cube = RandomModel(3, patch).double(), _cube(height, width)
    mean, variance = (torch.from_numpy(x.reshape(-1, model.width)) for x in _fuse_by_loop(model, cube))
    expected = model.decide(mean, variance)
    received = []
    decide, model.decide = model.decide, lambda *pair: received.append(pair) or decide(*pair)
    result = predict_scene(model, cube, batch_size=2, probabilities=True).fused
    np.testing.assert_array_equal(result.prediction.reshape(-1), expected.argmax(1).numpy())
    probabilities = result.probabilities.reshape(-1, CLASSES)
    np.testing.assert_allclose(probabilities, expected.exp(), rtol=0, atol=ROUNDED)
    # The maps are float32; what the model was asked to decide is float64, each row of the fusion in one call.
    rows = [pair for pair in received if len(pair[0]) == width]
    np.testing.assert_allclose(torch.cat([row[0] for row in rows]), mean, rtol=0, atol=EXACT)
    np.testing.assert_allclose(torch.cat([row[1] for row in rows]), variance, rtol=0, atol=EXACT)


@pytest.mark.parametrize("fused", [True, False])
def test_a_network_that_diverged_decides_nothing(fused):
    model = RandomModel(3, 5)
    model.place[4] = float("nan")
    with pytest.raises(UserError, match="not finite: the training diverged, lower optim.lr"):
        predict_scene(model, _cube(6, 6), fused=fused)


def test_wanted_pixels_are_decided_as_in_the_whole_scene_and_only_needed_patches_run():
    cube, model = _cube(14, 9), RandomModel(3, 5)
    wanted = np.zeros((14, 9), bool)
    wanted[0, 0] = wanted[12, 6] = wanted[12, 8] = True
    whole = predict_scene(model, cube)
    model.patches_seen = 0
    part = predict_scene(model, cube, wanted=wanted)
    assert model.patches_seen == 3 * 3 + 4 * 5
    model.patches_seen = 0
    centre_only = predict_scene(model, cube, fused=False, wanted=wanted)
    assert model.patches_seen == 3 and centre_only.fused is None
    pairs = [(part.fused, whole.fused), (part.centre, whole.centre), (centre_only.centre, whole.centre)]
    for one, other in pairs:
        np.testing.assert_array_equal(one.prediction[wanted], other.prediction[wanted])
        np.testing.assert_allclose(one.uncertainty[wanted], other.uncertainty[wanted], rtol=0, atol=EQUAL)
        assert (one.prediction[~wanted] == -1).all() and np.isnan(one.uncertainty[~wanted]).all()


def test_nothing_wanted_runs_nothing():
    model = RandomModel(3, 3)
    result = predict_scene(model, _cube(5, 5), wanted=np.zeros((5, 5), bool))
    assert model.patches_seen == 0
    assert (result.fused.prediction == -1).all() and (result.centre.prediction == -1).all()


def test_a_model_that_is_not_dense_is_read_at_the_centre():
    model, cube = RandomModel(3, 5, dense=False), _cube(8, 6)
    dense = predict_scene(RandomModel(3, 5), cube, probabilities=True)
    for predict in (predict_scene, reference.predict_scene):
        result = predict(model, cube, probabilities=True)
        assert result.fused is None
        _assert_equal(result.centre, dense.centre, EQUAL)


def test_the_modes_of_the_model_are_restored_and_its_statistics_untouched():
    model = RandomModel(3, 3).train()
    model.head[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict_scene(model, _cube(6, 6))
    assert model.training and model.head[2].training and not model.head[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_integer_cubes_give_what_their_float32_copy_gives():
    cube, model = (_cube(7, 8) * 100).astype(np.int16), RandomModel(3, 3)
    one, other = predict_scene(model, cube), predict_scene(model, cube.astype(np.float32))
    np.testing.assert_array_equal(one.fused.uncertainty, other.fused.uncertainty)


def test_batches_cover_the_mask_in_raster_order_and_span_few_rows():
    mask = keyed_normal(2, np.arange(300)).reshape(30, 10) > 1.2
    batches = list(raster_batches(mask, 7, 3))
    assert all(len(rows) <= 7 and rows[-1] - rows[0] < 3 for rows, _ in batches)
    actual = np.concatenate([np.stack(batch, 1) for batch in batches])
    np.testing.assert_array_equal(actual, np.argwhere(mask))


@pytest.mark.parametrize("backbone", ["ssrn", "hybridsn", "ssftt"])
def test_tiles_of_the_convolutional_pass_give_what_the_whole_scene_gives(backbone):
    cube = random_cube(25, 10, 31)
    model = build_bench_model(cube.reshape(-1, 31), 5, backbone).double()
    tiled = predict_scene_convolutional(model, cube, probabilities=True, tile_rows=7)
    whole = predict_scene_convolutional(model, cube, probabilities=True, tile_rows=25)
    np.testing.assert_allclose(tiled.probabilities, whole.probabilities, rtol=0, atol=ROUNDED)
    np.testing.assert_allclose(tiled.uncertainty, whole.uncertainty, rtol=ROUNDED)
    by_patch = predict_scene(model, cube, fused=False).centre.uncertainty
    # It is the same map but for the padding inside patches, not one that is shifted or turned.
    assert np.corrcoef(whole.uncertainty.ravel(), by_patch.ravel())[0, 1] > SAME_MAP


@pytest.mark.slow
def test_streaming_a_scene_of_pavia_size_takes_less_than_one_and_a_half_cubes_of_memory():
    # In a process of its own, for its own peak; 24 rows at either end are enough to reach it.
    code = """
import numpy as np
from pdml.tools.bench import build_bench_model, random_cube, run_form
cube = random_cube(610, 340, 103)
wanted = np.zeros(cube.shape[:2], bool)
wanted[:24] = wanted[-24:] = True
maps, cost = run_form("streaming", build_bench_model(cube[0], 9), cube, wanted)
print(cost["bytes"] / cube.nbytes)
"""
    root = Path(__file__).resolve().parents[2]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, check=True).stdout
    assert 0 < float(output) < 1.5


@pytest.mark.slow
def test_streaming_is_not_slower_than_materialising_all_patches():
    cube = random_cube(15, 340, 103)
    model = build_bench_model(cube[0], 9)
    forms = [predict_scene, reference.predict_scene] * 3
    seconds = [[], []]
    for turn, predict in enumerate(forms):
        begin = time.perf_counter()
        predict(model, cube)
        seconds[turn % 2].append(time.perf_counter() - begin)
    assert min(seconds[0]) < NOISE * min(seconds[1])
