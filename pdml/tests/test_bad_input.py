"""Bad input through the command line: exit code 2, one line with the file and the remedy, nothing overwritten."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from shared.run import __main__ as command_line
from shared.training.application import run_folder

ROW = "jasper-random-ssrn-plain"
SIZE, BANDS = 12, 8
SCENE = [
    "patch_size=3",
    f"components={BANDS}",
    "scale.steps=1",
    "optim.batch_size=8",
    "output.maps=false",
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
def reproduce(scene, tmp_path):
    """Runs the row on the scene; stale evidence and a checkpoint of the same name are there before."""

    def run(*overrides: str) -> int:
        arguments = ["reproduce", "pdml", "--scale", "lite", "--rows", ROW, "--seeds", "0"]
        arguments += ["--data-root", str(scene), "--results", str(tmp_path / "results"), *SCENE, *overrides]
        options = command_line.parse(arguments)
        cfg = command_line.row_config("pdml", ROW, 0, command_line.overrides_of(options, "pdml"))
        checkpoint = run_folder(cfg) / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(b"weights")
        return command_line.main(arguments)

    return run


@pytest.fixture
def evidence(tmp_path):
    """A run record of an older configuration of the row and seed."""
    path = tmp_path / "results" / "pdml" / "lite" / ROW / "seed0.json"
    path.parent.mkdir(parents=True)
    texts = dict.fromkeys(("selection", "variant", "config_sha256", "commit", "started_at"), "old")
    nothing = dict.fromkeys(("lock_sha256", "manifest_sha256", "driver"))
    groups = {"metrics": {"oa": 0.5}, "config": {}, "hardware": {}, "versions": {}}
    numbers = {"seed": 0, "n_test": 1, "wall_seconds": 1.0, "peak_memory_bytes": 1, "dirty": False}
    path.write_text(
        json.dumps({"paper": "pdml", "row": ROW, "scale": "lite"} | texts | nothing | groups | numbers)
    )
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2_and_nothing_is_overwritten(
    name, scene, reproduce, evidence, tmp_path, capsys, monkeypatch
):
    damage, overrides, file, remedy = BAD[name]
    damage(scene)
    before = contents(tmp_path)
    # Without the timed steps the job itself meets the bad input, with its folder and checkpoint at hand.
    monkeypatch.setattr(command_line, "cost", lambda paper, jobs: 1.0)
    monkeypatch.setattr(command_line, "lite_table", lambda *arguments: [])
    assert reproduce(*overrides) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{ROW} seed 0 failed: ")
    assert file in err and remedy in err
    after = contents(tmp_path)
    assert before.items() <= after.items()
    new = {path.name: content for path, content in after.items() if path not in before}
    assert b"UserError" in new.pop("failed.txt"), "the failure is recorded beside the run"
    assert new == {"last.ckpt": b"weights", "lock": b""}


def test_bad_input_is_said_before_anything_is_launched(scene, reproduce, capsys):
    (scene / "cube.mat").unlink()
    assert reproduce() == 2
    out, err = capsys.readouterr()
    assert err == f"{scene / 'cube.mat'} is missing: put the file there\n" and out == ""


def test_files_of_the_manifest_are_asked_for_with_their_source(scene, reproduce, capsys):
    assert (
        reproduce("data.manifest=jasper_ridge", "data.cube_file=hsi/jasper_ridge/JasperRidge2_R198.mat") == 2
    )
    err = capsys.readouterr().err
    assert err.startswith("hsi/jasper_ridge/JasperRidge2_R198.mat is missing") and err.count("\n") == 1
    assert "set DATA_ROOT=<folder>" in err and "source: " in err


def test_same_files_without_a_defect_run_and_replace_the_stale_evidence(scene, evidence, tmp_path, capsys):
    arguments = ["reproduce", "pdml", "--scale", "lite", "--rows", ROW, "--seeds", "0", *SCENE]
    arguments += ["--data-root", str(scene), "--results", str(tmp_path / "results")]
    assert command_line.main(arguments) == 0
    record = json.loads(evidence.read_text())
    assert record["config_sha256"] != "old" and record["n_test"] == SIZE * SIZE - 2 * 15
    assert capsys.readouterr().err == ""
