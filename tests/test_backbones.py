"""Weights of a pre-training begin a detector or a segmenter; any other file is refused in one sentence."""

import importlib

import pytest
import torch
from safetensors.torch import save_file

from shared.claims.compose import row_config
from shared.errors import UserError
from shared.training.config import run_folder

ROWS = {"globalmamba": "gm-camvid-vmamba", "v2m": "v2m-camvid-vmamba"}
PRETRAININGS = {"globalmamba": "gm-in1k-s", "v2m": "v2m-in1k-sstar"}
SMALL = ["model.network.depths=[1,1,1,1]", "trainer.accelerator=cpu"]


def config(paper: str, folder, weights, dims: int = 8):
    cfg = row_config(paper, ROWS[paper], 0, [*SMALL, f"model.network.dims={dims}"])
    cfg.paths.runs = str(folder / "runs")
    cfg.dense.weights = None if weights is None else str(weights)
    return cfg


def backbone(paper: str, folder, weights="untrained", dims: int = 8, seed: int = 0):
    cfg = config(paper, folder, weights, dims)
    cfg.seed = seed
    return importlib.import_module(f"{paper}.backbone").build_backbone(cfg)


def weights_of(network) -> dict[str, torch.Tensor]:
    """Return what a pre-training knows of a backbone, and a classifier."""
    state = {name: value for name, value in network.network.state_dict().items() if not name.startswith("outnorm")}
    return state | {"classifier.head.weight": torch.zeros(3, 8)}


def checkpoint(state: dict, *prefixes: str) -> dict:
    parts = {f"{prefix}{name}": value + n for n, prefix in enumerate(prefixes) for name, value in state.items()}
    return {"state_dict": parts, "global_step": 5}


@pytest.mark.parametrize("paper", ROWS)
def test_a_backbone_begins_with_the_weights_of_a_file_and_of_a_run_as_trained(paper, tmp_path):
    other = backbone(paper, tmp_path, seed=3)
    state = weights_of(other)
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(checkpoint(state, "model."), tmp_path / "run.ckpt")
    torch.save(checkpoint(state, "model.", "average."), tmp_path / "ema.ckpt")
    own = backbone(paper, tmp_path).network.state_dict()
    for file in ("weights.safetensors", "run.ckpt", "ema.ckpt"):
        loaded = backbone(paper, tmp_path, tmp_path / file).network.state_dict()
        for name, value in loaded.items():
            expected = own[name] if name.startswith("outnorm") else state[name]
            torch.testing.assert_close(value, expected, msg=name)


def half(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("paper", ROWS)
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("fault", ["missing", "damaged", "another network's", "something else"])
def test_another_file_is_refused_in_one_sentence(paper, ending, fault, tmp_path):
    path = tmp_path / f"weights.{ending}"
    state = weights_of(backbone(paper, tmp_path, dims=16 if fault == "another network's" else 8))
    if fault == "something else":
        state = {"numbers": torch.zeros(3)}
    if ending == "safetensors":
        save_file(state, path)
    else:
        torch.save([1, 2] if fault == "something else" else checkpoint(state, "model."), path)
    if fault == "damaged":
        half(path)
    if fault == "missing":
        path.unlink()
    sentence = {
        "missing": f"{path}, which {ROWS[paper]} begins with, is missing: give the weights of its network as",
        "damaged": f"{path} is damaged .*: give the last.ckpt of a run, or a .safetensors file$",
        "another network's": f"{path} does not fit row {ROWS[paper]}: .* give the weights of its own network$",
        "something else": f"{path} does not fit row {ROWS[paper]}: .* is missing, unknown or of another shape;",
    }[fault]
    with pytest.raises(UserError, match=sentence) as error:
        backbone(paper, tmp_path, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("paper", ROWS)
def test_a_pre_training_that_is_not_there_is_named_with_the_command_that_makes_it(paper, tmp_path):
    cfg = config(paper, tmp_path, None)
    cfg.dense.pretraining = PRETRAININGS[paper]
    command = f"make reproduce-{paper} SCALE=lite ROWS={PRETRAININGS[paper]} SEEDS=0"
    with pytest.raises(
        UserError, match=f"{tmp_path}.*last.ckpt, which .* is missing: train it with `{command}`, or give"
    ):
        importlib.import_module(f"{paper}.backbone").build_backbone(cfg)


@pytest.mark.parametrize("paper", ROWS)
def test_a_pre_training_that_has_not_ended_is_refused(paper, tmp_path):
    cfg = config(paper, tmp_path, None)
    cfg.dense.pretraining = PRETRAININGS[paper]
    pretraining = row_config(paper, PRETRAININGS[paper], 0)
    pretraining.paths = cfg.paths
    path = run_folder(pretraining) / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(checkpoint(weights_of(backbone(paper, tmp_path)), "model."), path)
    with pytest.raises(UserError, match="last.ckpt, which .* begins with, is of a training that has no record yet"):
        importlib.import_module(f"{paper}.backbone").build_backbone(cfg)
