"""Bad input through the command line: exit code 2, one line with what is wrong and the remedy, nothing overwritten."""

import pytest
import torch

from opera.train import pretraining_folder
from shared.run import __main__ as command_line

ROW = "digits-opera"
FEW = ["scale.epochs=1", "task.epochs=1", "trainer.accelerator=cpu", "logging.tensorboard=false"]
# The row, overrides, what is said, its remedy.
BAD = {
    "no labels": (
        ROW,
        ["data.labelled=0"],
        "needs labels and data.labelled=0.0 leaves none",
        "raise it, or take",
    ),
    "a part above the whole": (ROW, ["data.labelled=2"], "data.labelled=2.0 is no part", "set 0 to 1"),
    "batch larger than the data": (
        ROW,
        ["optim.batch_size=5000"],
        "do not fill one batch",
        "lower optim.batch_size",
    ),
    "probe's batch larger than the data": (
        ROW,
        ["task.batch_size=5000"],
        "do not fill one batch",
        "lower task.batch_size",
    ),
    "no data root": ("cifar10-opera", [], "data root is not set", "set DATA_ROOT=<folder>"),
    "no epochs": (ROW, ["scale.epochs=0"], "scale.epochs=0 trains nothing", "give 1 or more"),
    "no epochs of the task": (ROW, ["task.epochs=0"], "task.epochs=0 trains nothing", "give 1 or more"),
    "unknown arrangement": (ROW, ["objective.arrangement=omni"], "arrangement=omni is unknown", "one-space"),
    "unknown optimiser": (ROW, ["optim.name=adam"], "optim.name=adam is unknown", "choose one of lars"),
    "unknown set": (ROW, ["task.sets=[stl10]"], "there is no image set 'stl10'", "choose one of"),
    "no temperature": (ROW, ["objective.temperature=0"], "temperature=0", "set it above 0"),
    "a view's part of the area": (ROW, ["views.scale=[0.5,2]"], "views.scale", "two parts of the area"),
    "a blocked row": (
        "opera-seg-r50-bs1024-pt150",
        ["data.manifest=digits"],
        "is blocked",
        "choose another row",
    ),
    "a blocked row for eight GPUs": ("opera-t7-miou", [], "is blocked", "choose another row"),
    "fewer classes than there are": (ROW, ["data.classes=5"], "has 10 classes and", "set data.classes=10"),
    "float16": (ROW, ["optim.precision=16-mixed"], "optim.precision=16-mixed", "choose one of 32-true"),
}


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """Runs a row whose job itself meets the bad input; ``spoil`` gets the folder of its pre-training before."""
    monkeypatch.setattr(command_line, "cost", lambda paper, jobs: 1.0)
    monkeypatch.setattr(command_line, "lite_table", lambda *arguments: [])
    monkeypatch.setattr(command_line, "tables", lambda *arguments: (None, None, {"claims": []}))
    monkeypatch.delenv("DATA_ROOT", raising=False)

    def run(row: str, *overrides: str, spoil=lambda folder: None) -> int:
        scale = command_line.row_config("opera", row, 0).scale.name
        arguments = ["reproduce", "opera", "--scale", scale, "--rows", row, "--seeds", "0"]
        few = ["trainer.devices=1", "trainer.strategy=auto", *FEW]
        arguments += ["--results", str(tmp_path / "results"), *few, *overrides]
        options = command_line.parse(arguments)
        spoil(
            pretraining_folder(
                command_line.row_config("opera", row, 0, command_line.overrides_of(options, "opera"))
            )
        )
        return command_line.main(arguments)

    return run


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2_and_nothing_is_recorded(name, reproduce, tmp_path, capsys):
    row, overrides, wrong, remedy = BAD[name]
    assert reproduce(row, *overrides) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{row} seed 0 failed: ")
    assert wrong in err and remedy in err
    assert not list(tmp_path.rglob("seed0.json"))


def test_a_damaged_checkpoint_of_a_pretraining_is_one_line_and_stays(reproduce, capsys):
    kept = []

    def spoil(folder):
        folder.mkdir(parents=True)
        (folder / "last.ckpt").write_bytes(b"weights")
        kept.append(folder / "last.ckpt")

    assert reproduce(ROW, spoil=spoil) == 2
    err = capsys.readouterr().err
    assert "last.ckpt is damaged or no checkpoint" in err and "move it away" in err and err.count("\n") == 1
    assert kept[0].read_bytes() == b"weights"


def test_a_checkpoint_of_another_arrangement_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "cost", lambda paper, jobs: 1.0)
    results = ["--results", str(tmp_path)]
    few = [*FEW, "heads.hidden=16", "heads.dim=8"]
    arguments = ["reproduce", "opera", "--rows", ROW, "--seeds", "0", *results, *few]
    assert command_line.main(arguments) == 0
    checkpoint = next(tmp_path.glob("opera/runs/pretraining/*/last.ckpt"))
    evaluate = ["evaluate", "opera", *results, *few, "--ckpt", str(checkpoint)]
    assert command_line.main([*evaluate, "--row", ROW]) == 0
    capsys.readouterr()
    assert command_line.main([*evaluate, "--row", "digits-moco-v3"]) == 2
    err = capsys.readouterr().err
    assert "does not fit row digits-moco-v3" in err and err.count("\n") == 1


def test_weights_that_are_not_numbers_are_one_line(reproduce, capsys, monkeypatch):
    from opera import train

    def broken(*arguments):
        rows = torch.full((10, 4), torch.nan)
        return rows, torch.zeros(10, dtype=torch.long)

    monkeypatch.setattr(train, "outputs", broken)
    assert reproduce(ROW) == 2
    err = capsys.readouterr().err
    assert "not finite" in err and "lower optim.lr" in err and err.count("\n") == 1
