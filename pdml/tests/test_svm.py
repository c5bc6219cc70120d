"""The baseline without a network."""

import json

import numpy as np
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from pdml.scenes import load_scene
from pdml.svm import predict_svm
from pdml.tests.small import small_config
from pdml.train import run
from shared.training.application import measure
from shared.training.config import evidence_path

METHOD = ("method=svm", "model=none")


def test_it_is_scikit_learns_on_training_spectra_alone(tmp_path):
    cfg = small_config(tmp_path)
    scene, split = load_scene(cfg.data, 0, cfg.patch_size, None)
    actual = predict_svm(scene, split, 1.0).centre.prediction
    scaler = StandardScaler().fit(scene.cube[split.train])
    machine = SVC(kernel="linear").fit(scaler.transform(scene.cube[split.train]), scene.labels[split.train])
    expected = machine.predict(scaler.transform(scene.cube[split.test])) - 1
    assert np.mean(actual[split.test] != expected) < 1e-3  # float32 here, float64 there
    assert accuracy_score(scene.labels[split.test] - 1, actual[split.test]) > 0.5


def test_a_run_gives_a_record_without_what_it_cannot_have(tmp_path):
    cfg = small_config(tmp_path, *METHOD, "method.model.C=1.0")
    assert measure(cfg, run).startswith("OA % ")
    metrics = json.loads(evidence_path(cfg).read_text())["metrics"]
    assert metrics["oa"] == metrics["oa_centre"] > 0.5 and "oa_fused" not in metrics
    assert metrics["rho"] is None, "no uncertainty, no correlation"
