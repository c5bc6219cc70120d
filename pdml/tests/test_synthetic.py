"""The synthetic scene is the linear mixing model it says it is, and is neither trivial nor hopeless."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pdml.splits import make_split
from pdml.synthetic import endmembers, synthetic_scene

# The cube and the abundances are float32 numbers of order 1.
MIXING_TOLERANCE = 1e-6
# Accuracy of a linear SVM on single spectra, two in a hundred for training: clearly above chance (1/6), with
# room above it for methods that see the neighbourhood.
SVM_FROM, SVM_TO = 0.78, 0.90
DEFAULT = OmegaConf.load(Path(__file__).parents[1] / "configs/data/synthetic.yaml").synthetic


def scene(**changes):
    return synthetic_scene(48, 48, 64, 6, SimpleNamespace(**{**DEFAULT, **changes}))


def test_without_variability_and_noise_the_cube_is_abundances_times_endmembers():
    cube, abundances = scene(scale=0, shape=0, noise=0)
    expected = abundances @ endmembers(6, 64, SimpleNamespace(**DEFAULT))
    assert cube.shape == (48, 48, 64) and cube.dtype == abundances.dtype == np.float32
    assert np.allclose(cube, expected, rtol=0, atol=MIXING_TOLERANCE)


def test_abundances_are_shares_of_which_many_are_mixed_and_every_material_leads_somewhere():
    abundances = scene()[1]
    assert (abundances >= 0).all() and np.allclose(abundances.sum(2), 1, atol=MIXING_TOLERANCE)
    assert 0.1 < (abundances.max(2) < 0.6).mean() < 0.4
    assert np.bincount(abundances.argmax(2).ravel(), minlength=6).min() >= 100


@pytest.mark.parametrize("part", ["scale", "shape", "psf", "noise"])
def test_every_part_of_the_model_changes_the_cube(part):
    assert not np.allclose(scene()[0], scene(**{part: 0.0})[0], atol=1e-3)


def test_noise_has_the_deviation_that_the_config_gives():
    noise = scene(noise=0.05)[0] - scene(noise=0)[0]
    assert abs(noise.std() / 0.05 - 1) < 0.02  # 147,456 draws: ten standard deviations


def test_seed_of_the_scene_names_the_scene():
    assert np.array_equal(scene()[0], scene()[0])
    assert not np.array_equal(scene()[1], scene(seed=1)[1])


def test_linear_svm_on_single_spectra_leaves_room_for_better_methods():
    cube, abundances = scene()
    labels = abundances.argmax(2).astype(np.int16) + 1
    scores = []
    for seed in range(3):
        two_percent = SimpleNamespace(kind="percent", amount=2, minimum=3)
        split = make_split(labels, 6, two_percent, seed, 9, "synthetic")
        svm = make_pipeline(StandardScaler(), SVC(kernel="linear"))
        svm.fit(cube[split.train], labels[split.train])
        scores.append(svm.score(cube[split.test], labels[split.test]))
    assert SVM_FROM < np.mean(scores) < SVM_TO, scores
