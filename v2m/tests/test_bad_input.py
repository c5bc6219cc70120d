"""Bad input through the command line: exit code 2, one line with what is wrong and the remedy, nothing overwritten."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.data import manifest
from shared.run import __main__ as command_line
from shared.training.application import run_folder
from v2m.model import build_model

ROW = "digits-v2m"
FEW = ["scale.epochs=0.05", "optim.warmup_epochs=0.01", "trainer.accelerator=cpu", "trainer.backend=chunked"]
FEW += [
    "model.network.embed_dim=16",
    "model.network.depth=1",
    "logging.tensorboard=false",
    "optim.batch_size=8",
]
# The row, overrides, what is said, its remedy.
BAD = {
    "size that the patches do not tile": (
        ROW,
        ["model.network.patch_size=3"],
        "patches of 3 do not tile an image of 8 x 8",
        "multiples of patch_size",
    ),
    "patch of no pixels": (ROW, ["model.network.patch_size=0"], "patches of 0 do not tile", "multiples of"),
    "unknown class token": (
        ROW,
        ["model.network.class_token=first"],
        "class_token 'first'",
        "choose one of mean",
    ),
    "unknown corners": (
        ROW,
        ["model.network.mixer.corners=3"],
        "corners 3 is unknown",
        "choose one of 1, 2, 4",
    ),
    "unknown composition": (
        ROW,
        ["model.network.mixer.composition=woven"],
        "composition 'woven' is unknown",
        "choose one of sequential",
    ),
    "negative window": (
        ROW,
        ["model.network.mixer.window=-1"],
        "window -1 is no number of tokens",
        "or 0 for the whole grid",
    ),
    "broken window": (
        ROW,
        ["model.network.mixer.window=1.5"],
        "window 1.5 is no number",
        "or 0 for the whole",
    ),
    "corners of a word": (
        ROW,
        ["model.network.mixer.corners=true"],
        "corners True is unknown",
        "choose one of 1",
    ),
    "order without its corners": (
        ROW,
        ["model.network.mixer.order=rotated", "model.network.mixer.corners=2"],
        "order rotated turns the image",
        "set corners 4",
    ),
    "no state": (ROW, ["model.network.mixer.state_dim=0"], "state_dim 0", "give 1 to 64 states"),
    "more states than a scan has": (
        ROW,
        ["model.network.mixer.state_dim=65"],
        "state_dim 65",
        "give 1 to 64",
    ),
    "no tap": (ROW, ["model.network.mixer.conv_kernel=0"], "conv_kernel 0", "1 tap or more"),
    "no block": (ROW, ["model.network.depth=0"], "depth 0", "give 1 block or more"),
    "drop path of two": (ROW, ["model.network.drop_path=2"], "drop_path 2", "rates of 0 or more, below 1"),
    "one class token in a plane": (
        ROW,
        ["model.network.class_token=middle"],
        "makes the grid one row",
        "choose middle_cross or mean",
    ),
    "float16": (ROW, ["optim.precision=16-mixed"], "optim.precision=16-mixed", "choose one of 32-true"),
    "no time to train": (ROW, ["scale.epochs=-1"], "scale.epochs=-1", "give a positive number"),
    "unknown backend": (ROW, ["trainer.backend=fast"], "trainer.backend=fast", "choose one of auto"),
    "no such augmentation": (ROW, ["augment.crop=round"], "crop = round", "set random-resized or pad"),
    "batch larger than the data": (
        ROW,
        ["optim.batch_size=5000"],
        "do not fill one batch",
        "lower optim.batch_size",
    ),
    "subset larger than the data": (ROW, ["data.train_images=5000"], "a subset of 5000", "ask for 1 to"),
    "no data root": ("cifar10-v2m", [], "data root is not set", "set DATA_ROOT=<folder>"),
    "dense task": ("v2m-coco-sstar-1x-ap", [], "is blocked", "choose a row of classification"),
}


def scale_of(row: str) -> str:
    return command_line.row_config("v2m", row, 0).scale.name


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
        few = FEW if row == ROW else [one for one in FEW if not one.startswith("model.")]
        arguments = ["reproduce", "v2m", "--scale", scale_of(row), "--rows", row, "--seeds", "0"]
        arguments += ["--results", str(tmp_path / "results"), *few, *overrides]
        options = command_line.parse(arguments)
        cfg = command_line.row_config("v2m", row, 0, command_line.overrides_of(options, "v2m"))
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


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A data root of eight training and two test images of two classes, read when they are needed."""
    monkeypatch.setattr(manifest, "FOLDER", tmp_path / "manifests")
    root, folders = tmp_path / "pictures", []
    for split, count in (("train", 4), ("test", 1)):
        for number in range(2 * count):
            path = root / f"toy/{split}/{'ab'[number % 2]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
        numbers = {"classes": 2, "images": 2 * count, "per_class": count, "sha256": None}
        folders.append({"split": split, "path": f"toy/{split}", **numbers})
    manifest.FOLDER.mkdir()
    said = {"name": "toy", "title": "Toy", "source": "the toy shop", "terms": "none", "files": []}
    (manifest.FOLDER / "toy.yml").write_text(json.dumps({**said, "folders": folders}))  # JSON is YAML
    return root


@pytest.mark.parametrize("damage", ["truncated image", "missing folder"])
def test_damaged_data_are_one_line_with_their_source(damage, reproduce, pictures, capsys):
    if damage == "truncated image":
        path = pictures / "toy/train/b/3.png"
        path.write_bytes(path.read_bytes()[:40])
        words = "toy/train/b/3.png is missing, truncated or no image"
    else:
        (pictures / "toy/train").rename(pictures / "elsewhere")
        words = "toy/train is missing in DATA_ROOT="
    data = ["data.manifest=toy", "data.classes=2", "scale.epochs=1", "optim.batch_size=8"]
    assert reproduce(ROW, *data, f"paths.data_root={pictures}", trained=False) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{ROW} seed 0 failed: ") and err.count("\n") == 1
    assert words in err and "source: the toy shop" in err


def test_half_precision_on_a_cpu_without_it_is_one_line(reproduce, capsys, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert reproduce(ROW, "optim.precision=bf16-mixed") == 2
    err = capsys.readouterr().err
    assert "no bfloat16 arithmetic: set optim.precision=32-true" in err and err.count("\n") == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
def test_more_devices_than_are_here_is_said_before_anything_is_started(tmp_path, capsys):
    arguments = ["reproduce", "v2m", "--rows", ROW, "--results", str(tmp_path), "trainer.devices=8"]
    assert command_line.main(arguments) == 2
    err = capsys.readouterr().err
    assert "trainer.devices=8, but PyTorch sees no GPU here: set trainer.devices=1" in err
    assert err.count("\n") == 1 and not list(tmp_path.rglob("*"))


def test_evaluation_on_what_is_not_here_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "some.ckpt").write_bytes(b"")
    arguments = ["evaluate", "v2m", "--row", ROW, "--ckpt", str(tmp_path / "some.ckpt")]
    assert command_line.main([*arguments, "trainer.backend=fast"]) == 2
    assert "trainer.backend=fast is not known here: choose one of auto" in capsys.readouterr().err
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert command_line.main([*arguments, "optim.precision=bf16-mixed", "trainer.accelerator=cpu"]) == 2
    assert "this CPU has no bfloat16 arithmetic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rows", "digits-v2n"], "did you mean digits-v2m"),
        (["--rows", ROW, "model.network.mixer.corner=3"], "corner"),
        (["--rows", ROW, "--scale", "lite"], "belongs to scale demo"),
    ],
)
def test_unknown_row_or_key_is_one_line(arguments, words, tmp_path, capsys):
    assert command_line.main(["reproduce", "v2m", "--results", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def evaluate(tmp_path, row: str, checkpoint: Path, *overrides: str) -> int:
    arguments = ["evaluate", "v2m", "--row", row, "--ckpt", str(checkpoint)]
    few = [one for one in FEW if "epochs" not in one]
    return command_line.main([*arguments, "--out", str(tmp_path / "out"), *few, *overrides])


def test_checkpoint_of_another_model_or_a_damaged_one_is_one_line(tmp_path, capsys):
    cfg = command_line.row_config("v2m", "digits-vim", 0, FEW)
    state = {f"model.{name}": value for name, value in build_model(cfg).state_dict().items()}
    whole = tmp_path / "vim.ckpt"
    torch.save({"state_dict": state, "global_step": 3}, whole)
    (tmp_path / "half.ckpt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    said = {
        "vim": "does not fit row digits-v2m",
        "half": "damaged or no checkpoint",
        "foreign": "no checkpoint of a",
    }
    said["missing"] = "is missing"
    for name, words in said.items():
        assert evaluate(tmp_path, ROW, tmp_path / f"{name}.ckpt") == 2
        err = capsys.readouterr().err
        assert words in err and f"{name}.ckpt" in err and err.count("\n") == 1, name
    assert not (tmp_path / "out").exists()
    assert evaluate(tmp_path, "digits-vim", whole) == 0
    out = capsys.readouterr().out
    assert "top-1 %" in out and "images/s" in out and (tmp_path / "out" / "receptive_field.png").is_file()
