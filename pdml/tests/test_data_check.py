"""What `make data-check` says of scenes: their files are compared with the manifest before a checksum is recorded."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from pdml.matlab import read_mat
from pdml.tools.data_check import check_variables
from shared.data.manifest import DataFile, Manifest, Variable, load_manifest, locate
from shared.errors import UserError

LABELS = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
FILE = DataFile(path="hsi/labels.mat", sha256=None, keys={"labels": Variable(shape=(2, 3), dtype="uint8")})
TOY = Manifest(name="toy", title="Toy", source="a shop", terms="none", files=[FILE], counts={"labels": [1, 3]})


def store(root, labels=LABELS):
    (root / FILE.path).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(root / FILE.path, {"labels": labels})


def test_a_scene_is_described_and_recorded_and_then_held_to_its_checksum(tmp_path):
    store(tmp_path)
    assert check_variables(TOY, FILE, tmp_path) == "labels 2 x 3, 2 classes, 4 labelled"
    assert (tmp_path / ".sha256/toy.json").is_file()
    store(tmp_path, LABELS[::-1])
    with pytest.raises(UserError, match="wrong checksum"):
        check_variables(TOY, FILE, tmp_path)


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
def test_wrong_content_is_refused_before_its_checksum_is_recorded(tmp_path, labels, words):
    store(tmp_path, labels)
    with pytest.raises(UserError) as error:
        check_variables(TOY, FILE, tmp_path)
    assert re.search(words, str(error.value)) and "source: a shop" in str(error.value)
    assert not (tmp_path / ".sha256").exists()


@pytest.fixture
def real_root():
    root = os.environ.get("DATA_ROOT")
    if not root or not (Path(root) / "hsi").is_dir():
        pytest.skip("DATA_ROOT is not set or has no folder hsi: the real scenes are not embedded")
    return Path(root)


def test_the_derived_counts_are_those_of_the_real_files(real_root):
    image = pytest.importorskip("PIL.Image")
    jasper, pines = load_manifest("jasper_ridge"), load_manifest("indian_pines_train_pixels")
    abundances = read_mat(locate(jasper, real_root, "hsi/jasper_ridge/_EndJasperRidge2_R198.mat"), "A")
    assert np.bincount(abundances.argmax(axis=0)).tolist() == jasper.counts["largest_abundance"]
    for key, name in {"train_map": "IndianTR123_temp123.tif", "test_map": "IndianTE123_temp123.tif"}.items():
        labels = np.asarray(image.open(locate(pines, real_root, f"hsi/indian_pines_train_pixels/{name}")))
        assert labels.shape == (145, 145) and np.bincount(labels.ravel())[1:].tolist() == pines.counts[key]
