"""Manifests: what they name, how checksums are kept, and what `make data-check` says."""

import errno
import hashlib
import json
import logging
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from shared.data import manifest as module
from shared.data.manifest import DataFile, Manifest, Variable, load_manifest, locate, manifest_names, manifest_sha256
from shared.errors import UserError

LABELS = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
FILE = "hsi/toy/labels.mat"


def toy(**changes):
    fields = {"path": FILE, "sha256": None, **changes}
    return Manifest(
        name="toy",
        title="Toy",
        source="the toy shop",
        terms="not known",
        files=[DataFile(**fields)],
        counts={"labels": [1, 3]},
        root_marker="hsi",
    )


def store(root, labels=LABELS, file=FILE):
    """Write a label map and return its sha256."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"labels": labels})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def store_v73(root):
    (root / FILE).parent.mkdir(parents=True)
    with h5py.File(root / FILE, "w") as file:
        file["labels"] = LABELS


def record_of(root):
    return json.loads((root / ".sha256" / "toy.json").read_text())


@pytest.fixture
def only_toy(monkeypatch, tmp_path):
    """Make a toy manifest the only one; return what writes it with changes."""
    folder = tmp_path / "manifests"
    folder.mkdir()
    monkeypatch.setattr(module, "FOLDER", folder)

    def write(**changes):
        (folder / "toy.yml").write_text(json.dumps(toy(**changes).model_dump(mode="json")))  # JSON is YAML

    write()
    return write


# What the manifests say


@pytest.mark.parametrize("name", manifest_names())
def test_every_manifest_loads_and_says_source_and_terms(name):
    manifest = load_manifest(name)
    assert manifest.title and manifest.source and manifest.terms
    variables = {key for file in manifest.files for key in file.keys}
    if variables & set(manifest.counts):
        # the two maps that are TIFF files have no variables
        assert set(manifest.counts) - variables <= {"train_map", "test_map"}


def test_the_data_sets_are_there():
    cubes = {"indian_pines", "pavia_university", "ksc", "houston_2013", "salinas"}
    others = {"digits", "jasper_ridge", "indian_pines_train_pixels", "hsi_ground_truth"}
    images = {
        "cifar10_jpg",
        "cifar10",
        "cifar100",
        "tinyimagenet32",
        "imagenette96",
        "imagenet1k",
        "flowers102",
        "pets",
    }
    disjoint = {"indian_pines_disjoint", "pavia_university_disjoint"}
    retrieval = {"cub200", "cub50", "cars196", "cars196_train", "sop"}
    dense = {"coco2017", "coco256", "ade20k", "camvid"}
    assert set(manifest_names()) == cubes | disjoint | others | images | retrieval | dense
    # The users bring the cubes; nobody here has seen their checksums.
    assert all(load_manifest(name).files[0].sha256 is None for name in cubes | disjoint)


def test_a_file_named_by_two_manifests_is_the_same_file_in_both():
    entries = {}
    for name in manifest_names():
        for file in load_manifest(name).files:
            assert entries.setdefault(file.path, (file.sha256, file.keys)) == (file.sha256, file.keys)


@pytest.mark.parametrize(
    ("name", "key", "total"),
    [
        ("indian_pines", "indian_pines_gt", 10249),
        ("pavia_university", "paviaU_gt", 42776),
        ("ksc", "KSC_gt", 5211),
        ("houston_2013", "houston_gt_tr", 2832),
        ("houston_2013", "houston_gt_te", 12197),
        ("indian_pines_train_pixels", "Y_train", 695),
        ("indian_pines_train_pixels", "Y_test", 9671),
        ("jasper_ridge", "largest_abundance", 10000),
        ("cub200", "images", 11788),
        ("cub50", "images", 2889),
        ("cars196", "images", 16185),
        ("cars196_train", "images", 8144),
        ("sop", "images", 120053),
    ],
)
def test_counts_add_up_to_the_published_totals(name, key, total):
    assert sum(load_manifest(name).counts[key]) == total


def test_an_unknown_name_lists_the_names():
    with pytest.raises(UserError, match="no manifest 'ip'.*indian_pines"):
        load_manifest("ip")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"licence": "x"}, "licence"),
        ({"terms": None}, "terms"),
        ({"name": "other"}, "'other'"),
        ({"files": [{"path": "../x.mat", "sha256": None}]}, "inside it"),
        ({"files": [{"path": "/x.mat", "sha256": None}]}, "inside it"),
        ({"files": [{"path": "x.mat", "sha256": "abc"}]}, "sha256"),
        ({"files": [{"path": "x.mat"}]}, "sha256"),
    ],
)
def test_a_wrong_manifest_is_refused_by_file_and_key(only_toy, change, word):
    path = module.FOLDER / "toy.yml"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=rf"toy\.yml.*{word}"):
        load_manifest("toy")


def test_hash_of_a_manifest_follows_the_data_and_not_the_wording():
    changed = [
        toy(sha256="0" * 64),
        toy(path="hsi/other.mat"),
        toy(keys={"labels": Variable(shape=(3, 2))}),
        toy(keys={"labels": Variable(shape=(3, 2), dtype="uint8")}),
        toy().model_copy(update={"counts": {"labels": [2, 3]}}),
    ]
    assert len({manifest_sha256(manifest) for manifest in [toy(), *changed]}) == 6
    reworded = toy(note="said better").model_copy(update={"terms": "ask first", "title": "A toy"})
    assert manifest_sha256(reworded) == manifest_sha256(toy())


# Checksums


def test_a_known_checksum_is_compared_and_nothing_is_recorded(tmp_path):
    digest = store(tmp_path)
    assert locate(toy(sha256=digest), tmp_path, FILE) == tmp_path / FILE
    assert not (tmp_path / ".sha256").exists()
    wrong = "0" * 64
    with pytest.raises(UserError, match=rf"labels\.mat.*expected sha256 {wrong}, found {digest}.*the toy shop"):
        locate(toy(sha256=wrong), tmp_path, FILE)


def test_an_unknown_checksum_is_recorded_on_first_use_and_compared_ever_after(tmp_path):
    digest = store(tmp_path)
    locate(toy(), tmp_path, FILE)
    assert record_of(tmp_path) == {FILE: digest}
    locate(toy(), tmp_path, FILE)
    stored = store(tmp_path, LABELS + 1)
    with pytest.raises(UserError, match=rf"expected sha256 {digest}, found {stored}.*delete its line in"):
        locate(toy(), tmp_path, FILE)
    assert record_of(tmp_path) == {FILE: digest}
    assert os.listdir(tmp_path / ".sha256") == ["toy.json"]  # no temporary file is left


def test_recording_a_second_file_keeps_the_first(tmp_path):
    manifest = toy()
    other = "hsi/toy/other.mat"
    manifest.files.append(DataFile(path=other, sha256=None))
    first, second = store(tmp_path), store(tmp_path, LABELS + 1, other)
    locate(manifest, tmp_path, FILE)
    locate(manifest, tmp_path, other)
    assert record_of(tmp_path) == {FILE: first, other: second}


@pytest.mark.parametrize("write", [store, store_v73])
def test_half_a_download_is_refused_and_not_recorded(tmp_path, write):
    write(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        locate(toy(), tmp_path, FILE)
    (tmp_path / FILE).write_bytes(whole)
    locate(toy(), tmp_path, FILE)  # the whole file is not held to the half one's checksum


def test_a_read_only_data_root_is_a_warning_and_not_an_error(tmp_path, monkeypatch, caplog):
    store(tmp_path)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with caplog.at_level(logging.WARNING):
        assert locate(toy(), tmp_path, FILE) == tmp_path / FILE
    assert "could not be recorded" in caplog.text and "Read-only" in caplog.text


def test_a_failed_write_of_the_record_leaves_the_old_record_whole(tmp_path, monkeypatch, caplog):
    store(tmp_path)
    (tmp_path / ".sha256").mkdir()
    (tmp_path / ".sha256" / "toy.json").write_text('{"hsi/older.mat": "1"}')

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    locate(toy(), tmp_path, FILE)
    assert record_of(tmp_path) == {"hsi/older.mat": "1"} and os.listdir(tmp_path / ".sha256") == ["toy.json"]
    assert "No space left" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_refused_by_name(tmp_path, content):
    store(tmp_path)
    (tmp_path / ".sha256").mkdir()
    (tmp_path / ".sha256" / "toy.json").write_text(content)
    with pytest.raises(UserError, match=r"toy\.json.*delete it"):
        locate(toy(), tmp_path, FILE)


def test_a_file_is_hashed_once_a_process_and_again_when_it_changed(tmp_path, monkeypatch):
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    manifest = toy(sha256=store(tmp_path))
    for _ in range(3):
        locate(manifest, tmp_path, FILE)
    assert len(hashed) == 1
    os.utime(tmp_path / FILE, ns=(0, 0))
    locate(manifest, tmp_path, FILE)
    assert len(hashed) == 2


@pytest.mark.parametrize("root", [None, "", "absent"])
def test_a_missing_data_root_says_what_to_set_and_what_to_put_there(root, tmp_path):
    with pytest.raises(UserError, match=rf"set DATA_ROOT=.*put {FILE} there.*the toy shop"):
        locate(toy(), str(tmp_path / root) if root else root, FILE)


def test_a_missing_file_says_what_to_put_where_and_doubts_a_strange_root(tmp_path):
    with pytest.raises(UserError, match=rf"{FILE} is missing.*has no hsi.*right folder.*put {FILE} there"):
        locate(toy(), tmp_path, FILE)
    (tmp_path / "hsi").mkdir()
    with pytest.raises(UserError, match=rf"{FILE} is missing in DATA_ROOT={tmp_path}: set DATA_ROOT") as error:
        locate(toy(), tmp_path, FILE)
    assert "right folder" not in str(error.value)


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"toy names no file 'hsi/x\.mat'.*{FILE}"):
        locate(toy(), tmp_path, "hsi/x.mat")
