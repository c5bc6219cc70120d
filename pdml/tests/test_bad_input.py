"""Damaged scenes end a run with one line that names the file and the remedy (other bad input: ``contract.py``)."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from pdml.tests.contract import CONTRACT
from shared.testing.applications import Finished, call_application

ROW = "jasper-random-ssrn-plain"
SIZE, BANDS = 12, 8
SCENE = [
    "patch_size=3",
    f"components={BANDS}",
    "scale.steps=1",
    "optim.batch_size=8",
    "data.manifest=null",
    "data.cube_file=cube.mat",
    "data.cube_key=cube",
    "data.layout=hwb",
    f"data.height={SIZE}",
    f"data.width={SIZE}",
    f"data.bands={BANDS}",
    "data.labels_from=map",
    "data.labels_file=labels.mat",
    "data.labels_key=labels",
    "data.train_labels_file=labels.mat",
    "data.train_labels_key=train",
    "data.test_labels_file=labels.mat",
    "data.test_labels_key=test",
    "data.abundances_file=null",
    "data.class_names=[left,right]",
    "data.colours=['#ff0000','#0000ff']",
    "data.split.amount=20",
]


def change(path: Path, **variables) -> None:
    """Write a MATLAB file anew with some of its variables replaced."""
    old = {key: value for key, value in loadmat(path).items() if not key.startswith("__")}
    savemat(path, old | variables)


@pytest.fixture
def scene(tmp_path):
    """The folder of a small scene of two classes and the official pair of maps, cube.mat and labels.mat."""
    data = tmp_path / "data"
    data.mkdir()
    labels = np.where(np.arange(SIZE) < SIZE // 2, 1, 2).astype(np.uint8) * np.ones((SIZE, 1), np.uint8)
    noise = np.random.default_rng(0).normal(size=(SIZE, SIZE, BANDS))
    savemat(data / "cube.mat", {"cube": labels[..., None] + noise})
    even = np.arange(SIZE)[:, None] % 2 == 0
    savemat(data / "labels.mat", {"labels": labels, "train": labels * even, "test": labels * ~even})
    return data


def truncate(data: Path) -> None:
    content = (data / "cube.mat").read_bytes()
    (data / "cube.mat").write_bytes(content[: len(content) // 2])


def with_nan(data: Path) -> None:
    cube = loadmat(data / "cube.mat")["cube"]
    cube[3, 4, 5] = np.nan
    change(data / "cube.mat", cube=cube)


def rare_class(data: Path) -> None:
    labels = np.ones((SIZE, SIZE), np.uint8)
    labels[0, 0] = 2
    change(data / "labels.mat", labels=labels)


def untrained_class(data: Path) -> None:
    train = loadmat(data / "labels.mat")["train"]
    change(data / "labels.mat", train=np.where(train == 2, 0, train))


def keep(data: Path) -> None:
    pass


# What is done to the files, the overrides, the file that the sentence names, and its remedy.
BAD = {
    "missing .mat": (lambda data: (data / "cube.mat").unlink(), [], "cube.mat", "put the file there"),
    "truncated .mat": (truncate, [], "cube.mat", "download it again"),
    "wrong key": (keep, ["data.cube_key=Cube"], "cube.mat", "choose one of those that are there (cube)"),
    "labels of another size": (
        lambda data: change(data / "labels.mat", labels=np.ones((SIZE, SIZE - 1), np.uint8)),
        [],
        "labels.mat",
        "get the pair of files that belongs together",
    ),
    "cube of another size": (keep, ["data.bands=9"], "cube.mat", "fix data.bands"),
    "class too small for a percentage": (rare_class, [], "labels.mat", "lower data.split.amount"),
    "class too small for a count": (
        keep,
        ["data.split.kind=count", "data.split.amount=72"],
        "labels.mat",
        "lower data.split.amount",
    ),
    "class without training pixels in the official maps": (
        untrained_class,
        ["data.split.kind=official"],
        "labels.mat",
        "use the pair of maps that belongs together",
    ),
    "class without a labelled pixel": (
        lambda data: change(data / "labels.mat", labels=np.ones((SIZE, SIZE), np.uint8)),
        [],
        "labels.mat",
        "get the right label map",
    ),
    "even patch size": (keep, ["patch_size=4"], "labels.mat", "set an odd one, such as 5"),
    "NaN bands": (with_nan, [], "cube.mat: band 5", "data.drop_bands"),
    "too few training pixels for the components": (
        keep,
        ["data.split.amount=2", "data.split.minimum=1"],
        "",
        "lower 'components'",
    ),
}


@pytest.fixture
def run(scene, tmp_path):
    """Runs the row on the scene."""

    def run(*overrides: str) -> Finished:
        small = ["output.maps=false", "trainer.accelerator=cpu", "logger=none"]
        paths = [f"paths.{key}={tmp_path}/{key}" for key in ("runs", "results")]
        line = [f"+experiment={ROW}", *small, *paths, f"paths.data_root={scene}", *SCENE, *overrides]
        return call_application(CONTRACT.paper, "train", *line)

    return run


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2_and_nothing_is_recorded(name, scene, run, tmp_path):
    damage, overrides, file, remedy = BAD[name]
    damage(scene)
    before = {path: path.read_bytes() for path in scene.rglob("*") if path.is_file()}
    ended = run(*overrides)
    assert ended.code == 2 and len(ended.errors) == 1, ended.err
    assert file in ended.err and remedy in ended.err
    (failed,) = tmp_path.rglob("failed.txt")
    assert failed.read_text() == ended.err, "the failure is recorded beside the run"
    assert before == {path: path.read_bytes() for path in scene.rglob("*") if path.is_file()}
    assert not list(tmp_path.rglob("seed0.json")) and not list(tmp_path.rglob("*.ckpt"))


def test_files_of_the_manifest_are_asked_for_with_their_source(run):
    err = run("data.manifest=jasper_ridge", "data.cube_file=hsi/jasper_ridge/JasperRidge2_R198.mat").err
    assert err.startswith("hsi/jasper_ridge/JasperRidge2_R198.mat is missing") and err.count("\n") == 1
    assert "set DATA_ROOT=<folder>" in err and "source: " in err


def test_same_files_without_a_defect_run(run, tmp_path):
    ended = run()
    assert ended.code == 0 and not ended.err
    record = json.loads((tmp_path / "results" / "lite" / ROW / "seed0.json").read_text())
    assert record["n_test"] == SIZE * SIZE - 2 * 15
