"""Every experiment of GlobalMamba composes, stands in the ledger, and runs a step at toy size with all parameters."""

from pathlib import Path

import pytest
import torch

from globalmamba.train import prepare
from shared.claims.compose import compose, config_folder, hash_of, repository_root, row_config, row_overrides
from shared.claims.ledger import load_ledger
from shared.claims.reproduce import rows_of
from shared.errors import UserError

FILES = sorted(path.stem for path in (config_folder("globalmamba") / "experiment").glob("*.yaml"))
LEDGER = load_ledger(repository_root(), "globalmamba")
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
# Eight tokens a side: enough for four levels.
PLAIN = {
    "data.image_size": 8,
    "model.tokens.patch_size": 1,
    "model.network.embed_dim": 12,
    "model.network.depth": 2,
}
# Two tokens a side at the last stage: the scan of a single one has no past, so its A would have no gradient.
PYRAMID = {"data.image_size": 64, "model.network.dims": 8, "model.network.depths": [1, 1, 1, 1]}
# Behind the last block only the class token is read. Where it is the last token, the way back begins at it: the
# state has no past there either.
NO_PAST = dict.fromkeys(("cifar10-gm-class-last", "gm-in1k-m-class-last"), ["layers.1.mixer.A_b_log"])


def composed(row: str):
    return row_config("globalmamba", row, 0)


def toy(row: str):
    """Return the config of a row with a tiny network on the digits; everything else is its own."""
    cfg = composed(row)
    for key, value in (TOY | (PYRAMID if cfg.model.tokens is None else PLAIN)).items():
        group, *middle, name = key.split(".")
        node = cfg[group]
        for part in middle:
            node = node[part]
        node[name] = value
    return cfg


def test_ledger_and_experiment_files_hold_the_same_rows():
    assert sorted(SCALE_OF) == FILES
    runnable = {row for scale in ("demo", "lite", "full") for row in rows_of("globalmamba", scale)}
    assert runnable | {"gm-coco-s-dir", "gm-ade20k-s-delta"} == set(FILES)
    assert not {"gm-coco-s-dir", "gm-ade20k-s-delta"} & runnable  # blocked


@pytest.mark.parametrize("row", FILES)
def test_experiment_composes_to_its_own_row_at_the_scale_of_the_ledger(row):
    cfg = composed(row)
    assert (cfg.row, cfg.paper, cfg.scale.name) == (row, "globalmamba", SCALE_OF[row])


@pytest.mark.parametrize("row", FILES)
def test_experiment_opens_with_what_it_is_and_the_command_that_runs_it(row):
    lines = (config_folder("globalmamba") / "experiment" / f"{row}.yaml").read_text().splitlines()
    head = [line for line in lines[: lines.index("defaults:")] if line.startswith("# ")]
    assert head[0] == "# @package _global_"
    assert head[-1].startswith(f"# make reproduce-globalmamba SCALE={SCALE_OF[row]} ROWS={row}")
    words = " ".join(head)
    assert ("arXiv 2410.10316" in words and "Expected:" in words) or "Ours, no row of the paper" in words


@pytest.mark.parametrize("row", sorted(set(FILES) - set(BLOCKED)))
def test_experiment_takes_a_step_at_toy_size_and_every_parameter_gets_gradient(row):
    module, data = prepare(toy(row))
    network = module.model
    head = network.head if hasattr(network, "head") else network.classifier["head"]
    before = head.weight.clone()
    batch = next(iter(data.train_dataloader()))
    loss = module.loss(batch, 0)
    loss.backward()
    assert loss.isfinite()
    without = [
        name for name, p in module.model.named_parameters() if p.grad is None or not p.grad.count_nonzero()
    ]
    assert without == NO_PAST.get(row, [])
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.step()
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("row", BLOCKED)
def test_dense_rows_are_blocked_and_say_so(row):
    with pytest.raises(UserError, match=f"{row} is blocked: detection and segmentation"):
        prepare(composed(row))


def test_seed_reaches_the_config():
    assert composed(FILES[0]).seed == 0 and row_config("globalmamba", FILES[0], 3).seed == 3


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
    assert differing - {"variant"} == {"row", "model"}


CLAIMED = {"gm-in1k-m": "in1k-vim-t", "gm-in1k-tstar": "in1k-vim-s"}
CLAIMED |= {f"gm-in1k-{size}": f"in1k-vmamba-{size}" for size in "tsb"}


@pytest.mark.parametrize("row", CLAIMED)
def test_claimed_row_differs_from_the_baseline_of_the_paper_in_the_tokens_only(row):
    one, other = composed(row), composed(CLAIMED[row])
    assert {key for key in one if one[key] != other[key]} == {"row", "model"}
    shared = {key for key in other.model.network if key != "_target_"}
    assert all(one.model.network[key] == other.model.network[key] for key in shared)


@pytest.mark.parametrize("row", [*CLAIMED, *CLAIMED.values()])
def test_a_full_row_asks_for_eight_devices(row):
    trainer = composed(row).trainer
    assert (trainer.devices, trainer.strategy, trainer.workers) == (8, "ddp", 10)


def test_a_random_order_is_another_one_for_every_seed():
    orders = [
        row_config("globalmamba", "cifar10-gm-random", seed).model.tokens.order_seed for seed in range(3)
    ]
    assert orders == [0, 1, 2]


def test_no_two_rows_are_the_same_measurement():
    hashes = {row: hash_of(composed(row))[0] for row in FILES}
    assert len(set(hashes.values())) == len(hashes)


def test_backend_and_devices_change_no_hash():
    cfg = composed("digits-gm")
    before = hash_of(cfg)
    cfg.trainer.backend, cfg.trainer.devices = "reference", 4
    assert hash_of(cfg) == before
    cfg.model.network.depth += 1
    assert hash_of(cfg) != before


@pytest.mark.parametrize("key", ["optim.lrr", "data.sizes", "nothing", "augment.mixup"])
def test_unknown_key_is_named_in_one_sentence(key):
    with pytest.raises(UserError, match=key.split(".")[-1]) as error:
        compose("globalmamba", [f"{key}=1"])
    assert "\n" not in str(error.value)


def test_unknown_row_is_named_with_the_nearest_ones():
    with pytest.raises(UserError, match="'cifar10-gn'.*did you mean.*cifar10-gm"):
        row_overrides("globalmamba", "cifar10-gn", 0, [])
