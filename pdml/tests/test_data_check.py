"""`make data-check` of scenes: what their files hold is compared with the manifest before a checksum is recorded."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from pdml.matlab import read_mat
from pdml.tools.data_check import check_variables
from shared.data import manifest as module
from shared.data.__main__ import check_all, main
from shared.data.manifest import load_manifest, locate

LABELS = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
FILE = "hsi/toy/labels.mat"


def store(root, labels=LABELS):
    (root / FILE).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(root / FILE, {"labels": labels})


@pytest.fixture(autouse=True)
def only_toy(request, monkeypatch, tmp_path_factory):
    """Make a toy scene the only one."""
    if "real_root" in request.fixturenames:
        return
    folder = tmp_path_factory.mktemp("manifests")
    monkeypatch.setattr(module, "FOLDER", folder)
    files = [{"path": FILE, "sha256": None, "keys": {"labels": {"shape": [2, 3], "dtype": "uint8"}}}]
    toy = {"name": "toy", "title": "Toy", "source": "the toy shop", "terms": "not known", "files": files}
    (folder / "toy.yml").write_text(json.dumps(toy | {"counts": {"labels": [1, 3]}}))  # JSON is YAML


def check(root):
    return check_all(root, scenes=True, check=check_variables)


def test_a_scene_is_described_and_recorded_and_then_held_to_its_checksum(tmp_path, capsys):
    store(tmp_path)
    (row,) = check(tmp_path)
    assert row.status == "recorded" and row.detail == "labels 2 x 3, 2 classes, 4 labelled"
    store(tmp_path, LABELS[::-1])
    assert main(["--root", str(tmp_path)], scenes=True, check=check_variables) == 2
    assert "wrong checksum" in capsys.readouterr().err
    assert check_all(tmp_path) == []  # of scenes the general check says nothing


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS.T, r"labels is \(3, 2\) uint8"),
        (LABELS.astype(np.float64), "float64"),
        (np.array([[0, 1, 2], [2, 1, 0]], np.uint8), "counts {1: 2, 2: 2}"),
        (np.array([[0, 1, 2], [2, 2, 3]], np.uint8), "3: 1"),
    ],
    ids=["shape", "type", "count", "class"],
)
def test_data_check_refuses_wrong_content_before_it_records_its_checksum(tmp_path, labels, words):
    store(tmp_path, labels)
    (row,) = check(tmp_path)
    assert row.status == "wrong"
    assert re.search(words, row.detail)
    assert not (tmp_path / ".sha256").exists()
    assert main(["--root", str(tmp_path)], scenes=True, check=check_variables) == 2


@pytest.fixture
def real_root():
    root = os.environ.get("DATA_ROOT")
    if not root or not (Path(root) / "hsi").is_dir():
        pytest.skip("DATA_ROOT is not set or has no folder hsi: the real scenes are not embedded")
    return Path(root)


def test_no_real_scene_is_wrong(real_root):
    rows = check(real_root)
    assert {row.status for row in rows} <= {"present", "recorded", "missing"}
    assert any("labelled" in row.detail for row in rows)


def test_the_derived_counts_are_those_of_the_real_files(real_root):
    image = pytest.importorskip("PIL.Image")
    jasper, pines = load_manifest("jasper_ridge"), load_manifest("indian_pines_train_pixels")
    abundances = read_mat(locate(jasper, real_root, "hsi/jasper_ridge/_EndJasperRidge2_R198.mat"), "A")
    assert np.bincount(abundances.argmax(axis=0)).tolist() == jasper.counts["largest_abundance"]
    for key, name in {"train_map": "IndianTR123_temp123.tif", "test_map": "IndianTE123_temp123.tif"}.items():
        labels = np.asarray(image.open(locate(pines, real_root, f"hsi/indian_pines_train_pixels/{name}")))
        assert labels.shape == (145, 145) and np.bincount(labels.ravel())[1:].tolist() == pines.counts[key]
