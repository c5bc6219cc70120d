"""Bad input through the command line: exit code 2, one line with what is wrong and the remedy, nothing overwritten."""

from pathlib import Path

import pytest
import torch

from globalmamba.model import build_model
from shared.run import __main__ as command_line
from shared.training.application import run_folder

ROW = "digits-gm"
FEW = ["scale.epochs=0.05", "optim.warmup_epochs=0.01", "trainer.accelerator=cpu", "trainer.backend=chunked"]
FEW += [
    "model.network.embed_dim=16",
    "model.network.depth=1",
    "logging.tensorboard=false",
    "optim.batch_size=8",
]
# The row, overrides, what is said, its remedy.
BAD = {
    "image smaller than a patch": (
        ROW,
        ["model.tokens.patch_size=16"],
        "smaller than a patch",
        "lower patch_size",
    ),
    "size that the patches do not divide": (
        ROW,
        ["model.tokens.patch_size=3"],
        "no whole number of",
        "change one",
    ),
    "K that leaves a level empty": (ROW, ["model.tokens.levels=5"], "empty", "use at most 4 levels"),
    "K out of range": (ROW, ["model.tokens.levels=1"], "levels is 1", "choose from 2 to 6"),
    "size that the levels of a pyramid do not divide": (
        "cifar10-gm-pyramid",
        ["data=digits", "data.image_size=40", "model.network.dims=8"],
        "do not divide images of 40 x 40",
        "multiples of 16",
    ),
    "unknown order": (ROW, ["model.tokens.order=sideways"], "order is 'sideways'", "choose from low-high"),
    "float16": (ROW, ["optim.precision=16-mixed"], "optim.precision=16-mixed", "choose one of 32-true"),
    "no time to train": (ROW, ["scale.epochs=-1"], "scale.epochs=-1", "give a positive number"),
    "patch of no pixels": (ROW, ["model.tokens.patch_size=0"], "patch_size is 0", "1 or more"),
    "unknown backend": (ROW, ["trainer.backend=fast"], "trainer.backend=fast", "choose one of auto"),
    "no such augmentation": (ROW, ["augment.crop=round"], "crop = round", "set random-resized or pad"),
    "batch larger than the data": (
        ROW,
        ["optim.batch_size=5000"],
        "do not fill one batch",
        "lower optim.batch_size",
    ),
    "subset larger than the data": (ROW, ["data.train_images=5000"], "a subset of 5000", "ask for 1 to"),
    "no data root": ("cifar10-gm", [], "data root is not set", "set DATA_ROOT=<folder>"),
    "dense task": ("gm-coco-s-dir", [], "is blocked", "choose a row of classification"),
}


def scale_of(row: str) -> str:
    return command_line.row_config("globalmamba", row, 0).scale.name


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """Runs a row; a checkpoint of the same name is there before, and the job itself meets the bad input."""
    monkeypatch.setattr(command_line, "cost", lambda paper, jobs: 1.0)
    monkeypatch.setattr(command_line, "lite_table", lambda *arguments: [])
    monkeypatch.setattr(command_line, "tables", lambda *arguments: (None, None, {"claims": []}))
    monkeypatch.delenv("DATA_ROOT", raising=False)

    def run(row: str, *overrides: str) -> int:
        few = FEW if row == ROW else [one for one in FEW if not one.startswith("model.")]
        arguments = ["reproduce", "globalmamba", "--scale", scale_of(row), "--rows", row, "--seeds", "0"]
        arguments += ["--results", str(tmp_path / "results"), *few, *overrides]
        options = command_line.parse(arguments)
        cfg = command_line.row_config(
            "globalmamba", row, 0, command_line.overrides_of(options, "globalmamba")
        )
        checkpoint = run_folder(cfg) / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
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


def test_half_precision_on_a_cpu_without_it_is_one_line(reproduce, capsys, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert reproduce(ROW, "optim.precision=bf16-mixed") == 2
    err = capsys.readouterr().err
    assert "no bfloat16 arithmetic: set optim.precision=32-true" in err and err.count("\n") == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
def test_more_devices_than_are_here_is_said_before_anything_is_started(tmp_path, capsys):
    arguments = ["reproduce", "globalmamba", "--rows", ROW, "--results", str(tmp_path), "trainer.devices=8"]
    assert command_line.main(arguments) == 2
    err = capsys.readouterr().err
    assert "trainer.devices=8, but PyTorch sees no GPU here: set trainer.devices=1" in err
    assert err.count("\n") == 1 and not list(tmp_path.rglob("*"))


def test_evaluation_on_what_is_not_here_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "some.ckpt").write_bytes(b"")
    arguments = ["evaluate", "globalmamba", "--row", ROW, "--ckpt", str(tmp_path / "some.ckpt")]
    assert command_line.main([*arguments, "trainer.backend=fast"]) == 2
    assert "trainer.backend=fast is not known here: choose one of auto" in capsys.readouterr().err
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert command_line.main([*arguments, "optim.precision=bf16-mixed", "trainer.accelerator=cpu"]) == 2
    assert "this CPU has no bfloat16 arithmetic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rows", "digits-gn"], "did you mean digits-gm"),
        (["--rows", ROW, "model.tokens.level=3"], "level"),
        (["--rows", ROW, "--scale", "lite"], "belongs to scale demo"),
    ],
)
def test_unknown_row_or_key_is_one_line(arguments, words, tmp_path, capsys):
    assert command_line.main(["reproduce", "globalmamba", "--results", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def evaluate(tmp_path, row: str, checkpoint: Path, *overrides: str) -> int:
    arguments = ["evaluate", "globalmamba", "--row", row, "--ckpt", str(checkpoint)]
    few = [one for one in FEW if "epochs" not in one]
    return command_line.main([*arguments, "--out", str(tmp_path / "out"), *few, *overrides])


def test_checkpoint_of_another_model_or_a_damaged_one_is_one_line(tmp_path, capsys):
    cfg = command_line.row_config("globalmamba", "digits-vim", 0, FEW)
    state = {f"model.{name}": value for name, value in build_model(cfg).state_dict().items()}
    whole = tmp_path / "vim.ckpt"
    torch.save({"state_dict": state, "global_step": 3}, whole)
    (tmp_path / "half.ckpt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    said = {
        "vim": "does not fit row digits-gm",
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
