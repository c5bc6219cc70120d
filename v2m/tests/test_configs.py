"""Every experiment of V2M composes, stands in the ledger, and runs a step at toy size with all parameters."""

from pathlib import Path

import pytest
import torch

from shared.claims.compose import compose, config_folder, hash_of, repository_root, row_config, row_overrides
from shared.claims.ledger import load_ledger
from shared.claims.reproduce import rows_of
from shared.errors import UserError
from v2m.model import count
from v2m.train import prepare

FILES = sorted(path.stem for path in (config_folder("v2m") / "experiment").glob("*.yaml"))
LEDGER = load_ledger(repository_root(), "v2m")
SCALE_OF = {row.Row: s for s in ("demo", "lite", "full") for row in getattr(LEDGER, s.capitalize())}
SCALE_OF |= {Path(config).stem: "full" for model in LEDGER.Models for config in model.configs}
OWN = [*LEDGER.Lite, *LEDGER.Demo, *LEDGER.Full]
BLOCKED = [model.Claim.Row for model in LEDGER.Models if model.Claim.Status == "blocked"]
TOY = {
    "data.manifest": "digits",
    "data.classes": 10,
    "data.train_images": None,
    "optim.batch_size": 4,
    "optim.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.backend": "chunked",
    "trainer.devices": 1,
    "trainer.workers": 0,
    # One path in so shallow a network would often be dropped whole, and its parameters with it.
    "model.network.drop_path": 0.0,
}
PLAIN = {
    "data.image_size": 8,
    "model.network.patch_size": 2,
    "model.network.embed_dim": 12,
    "model.network.depth": 2,
}
# Two tokens a side at the last stage: the scan of a single one has no past, so its A would have no gradient.
PYRAMID = {"data.image_size": 64, "model.network.dims": 8, "model.network.depths": [1, 1, 1, 1]}

# The general recurrence begins without a way back, p2 = 0, and q2 is multiplied by it: it has a gradient from the
# second step on.
LATE = [f"layers.{i}.mixer.q2" for i in range(PLAIN["model.network.depth"])]


def composed(row: str):
    return row_config("v2m", row, 0)


def toy(row: str):
    """Return the config of a row with a tiny network on the digits; everything else is its own."""
    cfg = composed(row)
    for key, value in (TOY | (PLAIN if "image_size" in cfg.model.network else PYRAMID)).items():
        group, *middle, name = key.split(".")
        node = cfg[group]
        for part in middle:
            node = node[part]
        node[name] = value
    return cfg


def test_ledger_and_experiment_files_hold_the_same_rows():
    assert sorted(SCALE_OF) == FILES
    runnable = {row for scale in ("demo", "lite", "full") for row in rows_of("v2m", scale)}
    assert runnable | set(BLOCKED) == set(FILES)
    assert len(BLOCKED) == 9 and not set(BLOCKED) & runnable


@pytest.mark.parametrize("row", FILES)
def test_experiment_composes_to_its_own_row_at_the_scale_of_the_ledger(row):
    cfg = composed(row)
    assert (cfg.row, cfg.paper, cfg.scale.name) == (row, "v2m", SCALE_OF[row])


@pytest.mark.parametrize("row", FILES)
def test_experiment_opens_with_what_it_is_and_the_command_that_runs_it(row):
    lines = (config_folder("v2m") / "experiment" / f"{row}.yaml").read_text().splitlines()
    head = [line for line in lines[: lines.index("defaults:")] if line.startswith("# ")]
    assert head[0] == "# @package _global_"
    assert head[-1].startswith(f"# make reproduce-v2m SCALE={SCALE_OF[row]} ROWS={row}")
    words = " ".join(head)
    assert ("arXiv 2410.10382" in words and "Expected:" in words) or "Ours, no row of the paper" in words


@pytest.mark.parametrize("row", sorted(set(FILES) - set(BLOCKED)))
def test_experiment_takes_a_step_at_toy_size_and_every_parameter_gets_gradient(row):
    module, data = prepare(toy(row))
    network = module.model
    head = network.head if hasattr(network, "head") else network.classifier["head"]
    before = head.weight.clone()
    batch = next(iter(data.train_dataloader()))
    optimizer = module.configure_optimizers()["optimizer"]

    def without_gradient() -> list[str]:
        optimizer.zero_grad()
        loss = module.loss(batch, 0)
        loss.backward()
        assert loss.isfinite()
        parameters = network.named_parameters()
        return [name for name, p in parameters if p.grad is None or not p.grad.count_nonzero()]

    late = LATE if "roesser" in row else []
    assert without_gradient() == late
    optimizer.step()
    assert not torch.equal(head.weight, before)
    if late:
        assert without_gradient() == []


@pytest.mark.parametrize("row", BLOCKED)
def test_dense_rows_are_blocked_and_say_so(row):
    with pytest.raises(UserError, match=f"{row} is blocked: detection and segmentation"):
        prepare(composed(row))


def test_seed_reaches_the_config():
    assert composed(FILES[0]).seed == 0 and row_config("v2m", FILES[0], 3).seed == 3


@pytest.mark.parametrize("model", LEDGER.Models, ids=lambda model: model.Claim.Row)
def test_claimed_row_is_run_as_the_ledger_says(model):
    cfg, claim, said = composed(model.Claim.Row), model.Claim, model.Metadata
    assert (cfg.selection, cfg.variant) == (claim.Selection, claim.Variant)
    assert list(cfg.launcher.seeds) == claim.Seeds
    if claim.Status != "blocked":
        assert (cfg.scale.epochs, cfg.optim.batch_size) == (said.epochs, said.batch_size)
        assert cfg.optim.batch_size % (2 * cfg.trainer.devices) == 0


@pytest.mark.parametrize("row, baseline", [(row.Row, other) for row in OWN for other in row.Baseline])
def test_row_differs_from_its_baseline_in_the_network_only(row, baseline):
    one, other = composed(row), composed(baseline)
    differing = {key for key in one if one[key] != other[key]}
    assert differing - {"variant", "scale"} == {"row", "model"}
    assert ("scale" in differing) == ("-time" in row + baseline)


CLAIMED = {model.Claim.Row: model.Claim.Baseline.Row for model in LEDGER.Models if model.Claim.Baseline.Row}


def test_every_network_of_the_papers_table_has_a_baseline():
    assert CLAIMED == {
        "v2m-in1k-t": "in1k-vim-t",
        "v2m-in1k-s": "in1k-vim-s",
        "v2m-in1k-t-lw": "in1k-localvim-t",
        "v2m-in1k-s-lw": "in1k-localvim-s",
        "v2m-in1k-sstar": "in1k-vmamba-t",
        "v2m-in1k-bstar": "in1k-vmamba-s",
    }


@pytest.mark.parametrize("row", CLAIMED)
def test_claimed_row_differs_from_the_baseline_of_the_paper_in_the_network_only(row):
    one, other = composed(row), composed(CLAIMED[row])
    assert {key for key in one if one[key] != other[key]} == {"row", "model"}


@pytest.mark.parametrize("data", ["cifar10", "cifar10-all", "tiny32", "imagenette"])
def test_small_networks_have_the_parameters_of_vim_within_two_percent(data):
    vim = count(f"v2m/configs/experiment/{data}-vim.yaml")["parameters"]
    for row in FILES:
        if row.startswith(f"{data}-v2m"):
            assert count(f"v2m/configs/experiment/{row}.yaml")["parameters"] == pytest.approx(
                vim, rel=0.02
            ), row


@pytest.mark.parametrize("row", [*CLAIMED, *CLAIMED.values()])
def test_a_full_row_asks_for_eight_devices(row):
    trainer = composed(row).trainer
    assert (trainer.devices, trainer.strategy, trainer.workers) == (8, "ddp", 10)


def test_no_two_rows_are_the_same_measurement():
    hashes = {row: hash_of(composed(row))[0] for row in FILES}
    assert len(set(hashes.values())) == len(hashes)


def test_backend_and_devices_change_no_hash():
    cfg = composed("digits-v2m")
    before = hash_of(cfg)
    cfg.trainer.backend, cfg.trainer.devices = "reference", 4
    assert hash_of(cfg) == before
    cfg.model.network.depth += 1
    assert hash_of(cfg) != before


@pytest.mark.parametrize("key", ["optim.lrr", "data.sizes", "nothing", "augment.mixup"])
def test_unknown_key_is_named_in_one_sentence(key):
    with pytest.raises(UserError, match=key.split(".")[-1]) as error:
        compose("v2m", [f"{key}=1"])
    assert "\n" not in str(error.value)


def test_unknown_row_is_named_with_the_nearest_ones():
    with pytest.raises(UserError, match="'cifar10-v2n'.*did you mean.*cifar10-v2m"):
        row_overrides("v2m", "cifar10-v2n", 0, [])
