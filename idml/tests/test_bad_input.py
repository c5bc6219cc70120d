"""Bad input through the command line: exit code 2, one line with what is wrong and the remedy, nothing overwritten."""

from pathlib import Path

import pytest
import torch

from idml import scoring
from idml.tests.test_sets import cub
from shared.data import manifest
from shared.run import __main__ as command_line
from shared.training.application import run_folder

ROW = "digits-idml-pa"
FEW = ["scale.epochs=1", "trainer.accelerator=cpu", "logging.tensorboard=false", "output.pictures=false"]
# The row, overrides, what is said, its remedy.
BAD = {
    "no weights": (
        "idml-pa-cub",
        ["data.manifest=digits"],
        "starts from ImageNet's weights",
        "paths.weights=<file>",
    ),
    "no data root": ("cub50-idml-pa", [], "data root is not set", "set DATA_ROOT=<folder>"),
    "unknown scaling": (ROW, ["metric.scaling=log"], "metric.scaling=log", "choose the scaling from raw"),
    "unknown combination": (
        ROW,
        ["metric.combination=mean"],
        "metric.combination=mean",
        "the combination from sum",
    ),
    "tau of zero": (ROW, ["metric.tau=0"], "metric.tau=0", "set tau above 0"),
    "unknown selection": (ROW, ["selection=best"], "selection=best is unknown", "choose one of last-epoch"),
    "nothing held out": (
        ROW,
        ["selection=held-out"],
        "needs training classes that do not train",
        "data.held_out",
    ),
    "too much held out": (ROW, ["data.held_out=0.9"], "data.held_out=0.9 of 5 classes", "set 0, or a part"),
    "no epochs": (ROW, ["scale.epochs=0"], "scale.epochs=0 trains nothing", "give 1 or more"),
    "batch larger than the data": (
        ROW,
        ["optim.batch_size=5000"],
        "do not fill one batch",
        "lower optim.batch_size",
    ),
    "batch that cannot be balanced": (ROW, ["data.per_class=7"], "two or more groups of 7", "a multiple of"),
    "unknown backbone": (
        ROW,
        ["model.backbone=vgg"],
        "model.backbone=vgg is unknown",
        "choose one of resnet50",
    ),
    "no dimension": (ROW, ["model.semantic_dim=0"], "model.semantic_dim=0", "to 1 or more"),
    "float16": (ROW, ["optim.precision=16-mixed"], "optim.precision=16-mixed", "choose one of 32-true"),
}


def scale_of(row: str) -> str:
    return command_line.row_config("idml", row, 0).scale.name


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """Runs a row; a checkpoint of the same name is there before, and the job itself meets the bad input."""
    monkeypatch.setattr(command_line, "cost", lambda paper, jobs: 1.0)
    monkeypatch.setattr(command_line, "lite_table", lambda *arguments: [])
    monkeypatch.setattr(command_line, "tables", lambda *arguments: (None, None, {"claims": []}))
    monkeypatch.delenv("DATA_ROOT", raising=False)

    def run(row: str, *overrides: str, trained: bool = True) -> int:
        arguments = ["reproduce", "idml", "--scale", scale_of(row), "--rows", row, "--seeds", "0"]
        few = ["trainer.devices=1", "trainer.strategy=auto", *FEW]
        arguments += ["--results", str(tmp_path / "results"), *few, *overrides]
        options = command_line.parse(arguments)
        cfg = command_line.row_config("idml", row, 0, command_line.overrides_of(options, "idml"))
        checkpoint = run_folder(cfg) / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        if trained:
            checkpoint.write_bytes(b"weights")
        return command_line.main(arguments)

    return run


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2_and_nothing_is_overwritten(name, reproduce, tmp_path, capsys):
    row, overrides, wrong, remedy = BAD[name]
    code = reproduce(row, *overrides)
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"{row} seed 0 failed: ")
    assert wrong in err and remedy in err
    after = {path.name: content for path, content in contents(tmp_path).items()}
    assert b"UserError" in after.pop("failed.txt"), "the failure is recorded beside the run"
    assert after == {"last.ckpt": b"weights", "lock": b""}


def test_a_damaged_checkpoint_is_one_line(reproduce, capsys):
    assert reproduce(ROW) == 2
    err = capsys.readouterr().err
    assert "last.ckpt is damaged or no checkpoint" in err and "move it away" in err and err.count("\n") == 1


def test_one_class_alone_in_a_batch_is_one_line(reproduce, capsys):
    assert reproduce(ROW, "loss=contrastive", "optim.batch_size=1", trained=False) == 2
    err = capsys.readouterr().err
    assert (
        "a batch of 1 images has one class alone, and contrastive compares classes: raise optim.batch_size"
        in err
    )
    assert err.count("\n") == 1


def test_embeddings_that_are_not_numbers_are_one_line(reproduce, capsys, monkeypatch):
    def broken(network, images):
        rows = torch.full((len(images), 4), torch.nan)
        return rows, rows[:, 0], rows[:, 0]

    monkeypatch.setattr(scoring, "embed_batch", broken)
    assert reproduce(ROW, trained=False) == 2
    err = capsys.readouterr().err
    assert "lower optim.lr" in err and err.count("\n") == 1


def test_a_corrupt_image_and_annotations_that_do_not_match_are_one_line(
    reproduce, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(manifest, "FOLDER", tmp_path / "manifests")
    manifest.FOLDER.mkdir()
    toy = ["data.classes=2", "data.held_out=0", "selection=last-epoch", "optim.batch_size=4"]
    toy += ["data.image_size=32"]
    folder = cub(tmp_path / "one")
    (folder / "images/001.bird/1.png").write_bytes(b"no picture")
    assert reproduce("cub50-pa", *toy, f"paths.data_root={tmp_path}/one", trained=False) == 2
    err = capsys.readouterr().err
    assert "1.png is missing, truncated or no image" in err and "get the file again" in err
    assert err.count("\n") == 1
    (cub(tmp_path / "two") / "image_class_labels.txt").write_text("1 1\n")
    assert reproduce("cub50-pa-mixup", *toy, f"paths.data_root={tmp_path}/two", trained=False) == 2
    err = capsys.readouterr().err
    assert "do not match, image 2 is in one" in err and err.count("\n") == 1
