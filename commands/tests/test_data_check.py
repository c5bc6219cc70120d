"""`make data-check`: which data are there, and which of them are wrong."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from commands.__main__ import main
from commands.data_check import check_all
from shared.claims.protocol import load_paper, paper_names
from shared.data import manifest as module
from shared.data.manifest import load_manifest, manifest_names
from shared.environment import repository_root

LABELS = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
FILE = "hsi/toy/labels.mat"
PAPERS = [load_paper(repository_root(), name) for name in paper_names(repository_root())]


def data_check(root) -> int:
    return main(["data-check", "--data-root", str(root)])


def store(root, labels=LABELS) -> str:
    """Write a label map and return its sha256."""
    (root / FILE).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(root / FILE, {"labels": labels})
    return hashlib.sha256((root / FILE).read_bytes()).hexdigest()


@pytest.fixture
def only_toy(monkeypatch, tmp_path):
    """Make a toy manifest the only one; return what writes it with changes."""
    monkeypatch.setattr(module, "FOLDER", tmp_path / "manifests")
    (tmp_path / "manifests").mkdir()

    def write(folders=(), counts=None, **changes) -> None:
        files = [] if folders else [{"path": FILE, "sha256": None, **changes}]
        toy = {"name": "toy", "title": "Toy", "source": "the toy shop", "terms": "not known", "files": files}
        text = json.dumps(toy | {"folders": list(folders), "counts": counts or {}})
        (tmp_path / "manifests/toy.yml").write_text(text)  # JSON is YAML

    write()
    return write


def test_a_file_is_missing_then_recorded_then_wrong(only_toy, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    assert data_check(root) == 0
    assert [row.status for row in check_all(root)] == ["missing"]
    store(root)
    assert data_check(root) == 0
    assert [row.status for row in check_all(root)] == ["recorded"]
    store(root, LABELS[::-1])
    assert data_check(root) == 2
    assert "wrong checksum" in capsys.readouterr().err


def test_a_damaged_record_of_checksums_is_an_error(only_toy, tmp_path):
    store(tmp_path)
    (tmp_path / ".sha256").mkdir()
    (tmp_path / ".sha256/toy.json").write_text("{")
    assert data_check(tmp_path) == 2


def test_a_file_of_the_known_checksum_is_present(only_toy, tmp_path):
    only_toy(sha256=store(tmp_path))
    assert [row.status for row in check_all(tmp_path)] == ["present"]


def test_a_paper_says_more_of_a_file_whose_variables_its_manifest_names(only_toy, tmp_path):
    only_toy(counts={"labels": [1, 3]}, keys={"labels": {"shape": [2, 3], "dtype": "uint8"}})
    store(tmp_path)
    assert [row.detail for row in check_all(tmp_path, PAPERS)] == ["labels 2 x 3, 2 classes, 4 labelled"]
    store(tmp_path, LABELS.T)
    (tmp_path / ".sha256/toy.json").unlink()
    assert data_check(tmp_path) == 2 and not (tmp_path / ".sha256/toy.json").exists()


def test_folders_of_images_are_present_counted_wrong_or_missing(only_toy, tmp_path):
    pictures = [tmp_path / f"toy/train/{name}/1.png" for name in ("ape", "bee")]
    for number, path in enumerate(pictures):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]
    listing = "".join(f"{digest}  {name}/1.png\n" for digest, name in zip(sums, ("ape", "bee"), strict=True))
    folder = {"split": "train", "path": "toy/train", "classes": 2, "images": 2, "per_class": 1}
    only_toy(folders=[folder | {"sha256": None}])
    (row,) = check_all(tmp_path)
    assert row.status == "counted" and row.detail == "2 classes, 2 images, no checksum known"
    only_toy(folders=[folder | {"sha256": hashlib.sha256(listing.encode()).hexdigest()}])
    (row,) = check_all(tmp_path)
    assert row.status == "present" and row.detail == "2 classes, 2 images"
    pictures[0].rename(tmp_path / "spare.png")
    pictures[1].rename(pictures[0])
    (tmp_path / "spare.png").rename(pictures[1])
    (row,) = check_all(tmp_path)
    assert row.status == "wrong" and "wrong checksum" in row.detail
    (tmp_path / "toy").rename(tmp_path / "moved")
    assert [row.status for row in check_all(tmp_path)] == ["missing"]


@pytest.mark.parametrize("root", ["", "/dev/null"])
def test_a_bad_root_is_code_2_and_one_sentence(root, capsys):
    assert data_check(root) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "set DATA_ROOT" in output.err


def test_an_empty_root_is_fine(tmp_path, capsys):
    assert data_check(tmp_path) == 0
    assert {row.status for row in check_all(tmp_path)} == {"embedded", "missing"}
    assert "0 wrong" in capsys.readouterr().out


def test_the_real_files_are_those_of_the_manifests():
    root = os.environ.get("DATA_ROOT")
    if not root or not (Path(root) / "hsi").is_dir():
        pytest.skip("DATA_ROOT is not set or has no folder hsi: the real scenes are not embedded")
    rows = check_all(root, PAPERS)
    files = [file for name in manifest_names() for file in load_manifest(name).files]
    known = {file.path for file in files if file.sha256 and file.path.startswith("hsi/")}
    assert {row.status for row in rows if row.file in known} == {"present"}
    assert any("labelled" in row.detail for row in rows)
