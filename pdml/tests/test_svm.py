"""The baseline without a network."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pdml.model import PrincipalComponents
from pdml.scenes import load_scene
from pdml.svm import INPUTS, predict_svm, svm_input
from pdml.tests.small import small_config
from pdml.train import run
from shared.errors import UserError
from shared.training.application import measure
from shared.training.config import evidence_path

METHOD = ("method=svm", "model=none")


def test_it_is_scikit_learns_on_training_spectra_alone(tmp_path):
    cfg = small_config(tmp_path)
    scene, split = load_scene(cfg.data, 0, cfg.patch_size, None)
    actual = predict_svm(scene, split, 1.0, "spectrum", 30).centre.prediction
    scaler = StandardScaler().fit(scene.cube[split.train])
    machine = SVC(kernel="linear").fit(scaler.transform(scene.cube[split.train]), scene.labels[split.train])
    expected = machine.predict(scaler.transform(scene.cube[split.test])) - 1
    assert np.mean(actual[split.test] != expected) < 1e-3  # float32 here, float64 there
    assert accuracy_score(scene.labels[split.test] - 1, actual[split.test]) > 0.5


def test_components_are_what_the_networks_see(tmp_path):
    cfg = small_config(tmp_path)
    scene, split = load_scene(cfg.data, 0, cfg.patch_size, None)
    spectral = PrincipalComponents(scene.cube.shape[2], 30)
    spectral.fit(scene.cube[split.train])
    seen = spectral(torch.from_numpy(scene.cube[split.train].T[None, :, :, None].copy()))[0, :, :, 0].T  # (n, 30)
    for kind in ("components", "components-as-scaled"):
        actual = svm_input(scene, split, kind, 30)[split.train]
        assert np.allclose(actual, seen.numpy(), rtol=0, atol=1e-4)  # float32, sums in another order
    # The networks' scaling: the first component has a standard deviation of 1, the last one far less.
    assert abs(actual[:, 0].std(ddof=1) - 1) < 1e-3 and actual[:, -1].std() < 0.2


def test_the_two_scalings_of_the_components_are_two_machines(tmp_path):
    cfg = small_config(tmp_path)
    scene, split = load_scene(cfg.data, 0, cfg.patch_size, None)
    own, theirs = (predict_svm(scene, split, 1.0, kind, 30).centre.prediction for kind in INPUTS[1:])
    pixels = svm_input(scene, split, "components-as-scaled", 30)
    labels = scene.labels[split.train]
    expected = SVC(kernel="linear").fit(pixels[split.train], labels).predict(pixels[split.test]) - 1
    assert np.array_equal(theirs[split.test], expected)
    scaled = StandardScaler().fit(pixels[split.train]).transform
    expected = SVC(kernel="linear").fit(scaled(pixels[split.train]), labels).predict(scaled(pixels[split.test])) - 1
    assert np.array_equal(own[split.test], expected) and not np.array_equal(own, theirs)


def test_an_unknown_input_names_the_known_ones(tmp_path):
    cfg = small_config(tmp_path)
    with pytest.raises(UserError, match="set one of spectrum, components, components-as-scaled"):
        svm_input(*load_scene(cfg.data, 0, cfg.patch_size, None), "pca", 30)


def test_a_run_gives_a_record_without_what_it_cannot_have(tmp_path):
    cfg = small_config(tmp_path, *METHOD, "method.model.C=1.0")
    assert measure(cfg, run).startswith("OA % ")
    metrics = json.loads(evidence_path(cfg).read_text())["metrics"]
    assert metrics["oa"] == metrics["oa_centre"] > 0.5 and "oa_fused" not in metrics
    assert metrics["rho"] is None, "no uncertainty, no correlation"
