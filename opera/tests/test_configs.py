"""Every experiment of OPERA composes, stands in the ledger, and runs a step at toy size with all parameters."""

import functools

import pytest

from opera.train import prepare, pretraining_folder
from shared.claims.compose import compose, config_folder, hash_of, repository_root, row_config
from shared.claims.ledger import load_ledger
from shared.claims.reproduce import rows_of
from shared.errors import UserError

FILES = sorted(path.stem for path in (config_folder("opera") / "experiment").glob("*.yaml"))
LEDGER = load_ledger(repository_root(), "opera")
SCALE_OF = {row.Row: s for s in ("demo", "lite", "full") for row in getattr(LEDGER, s.capitalize())}
SCALE_OF |= {model.Claim.Row: "full" for model in LEDGER.Models}
BLOCKED = {model.Claim.Row for model in LEDGER.Models if model.Claim.Status == "blocked"}
OWN = [*LEDGER.Lite, *LEDGER.Demo, *LEDGER.Full]
SMALL = {
    "optim.batch_size": 16,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.workers": 0,
    "data.manifest": "digits",
    "data.image_size": 8,
    "data.classes": 10,
    "data.train_images": None,
    "heads.dim": 8,
    "heads.hidden": 16,
    "heads.class_hidden": 8,
    "optim.precision": "32-true",
}


@functools.cache
def kept(row: str):
    return row_config("opera", row, 0)


def composed(row: str):
    """Return the config of a row, to be changed at will."""
    return kept(row).copy()


def toy(row: str):
    """Return the config of a row with a tiny network on the digits; everything else is its own."""
    cfg = composed(row)
    for key, value in SMALL.items():
        group, name = key.split(".")
        cfg[group][name] = value
    if cfg.objective.mask is not None:
        cfg.objective.mask.width, cfg.objective.mask.depth, cfg.objective.mask.heads = 8, 1, 1
    cfg.model.backbone = "vit-tiny" if cfg.model.backbone.startswith("vit") else "convnet-tiny"
    return cfg


def test_ledger_and_experiment_files_hold_the_same_rows():
    assert sorted(SCALE_OF) == FILES
    shown = {row for scale in ("demo", "lite", "full") for row in rows_of("opera", scale)}
    assert shown == set(FILES) - BLOCKED


@pytest.mark.parametrize("row", FILES)
def test_experiment_composes_to_its_own_row_and_says_what_it_is_and_how_it_is_run(row):
    cfg = composed(row)
    assert (cfg.row, cfg.paper, cfg.scale.name) == (row, "opera", SCALE_OF[row])
    lines = (config_folder("opera") / "experiment" / f"{row}.yaml").read_text().splitlines()
    head = [line for line in lines[: lines.index("defaults:")] if line.startswith("# ")]
    assert head[0] == "# @package _global_"
    assert head[-1].startswith(f"# make reproduce-opera SCALE={SCALE_OF[row]} ROWS={row}")
    words = " ".join(head)
    assert "Expected:" in words or "Ours, no row of the paper" in words
    assert ("Blocked:" in words) == (row in BLOCKED)


@pytest.mark.parametrize("row", sorted(set(FILES) - BLOCKED))
def test_experiment_takes_a_step_at_toy_size_and_every_parameter_gets_gradient(row):
    module, data = prepare(toy(row))
    loss = module.train().loss(next(iter(data.train_dataloader())), 0)
    loss.backward()
    assert loss.isfinite()
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    assert {name for name, p in trained.items() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize("row", sorted(BLOCKED)[:2])
def test_a_blocked_row_says_so(row):
    with pytest.raises(UserError, match=f"{row} is blocked: detection and segmentation"):
        prepare(toy(row))


@pytest.mark.parametrize("model", LEDGER.Models, ids=lambda model: model.Claim.Row)
def test_claimed_row_is_run_as_the_ledger_says(model):
    cfg, claim, said = composed(model.Claim.Row), model.Claim, model.Metadata
    assert (cfg.selection, cfg.variant) == (claim.Selection, claim.Variant)
    assert list(cfg.launcher.seeds) == claim.Seeds
    assert (cfg.scale.epochs, cfg.optim.batch_size) == (said.epochs, said.batch_size)
    words = f"{claim.Source.row} {claim.Row}"
    for name, backbone in (("r50", "resnet50"), ("vit-s", "vit-small"), ("vit-b", "vit-base")):
        if name in words.lower():
            assert cfg.model.backbone == backbone


PAIRS = [(row.Row, other) for row in OWN for other in row.Baseline]


@pytest.mark.parametrize("row, baseline", PAIRS)
def test_row_differs_from_its_baseline_in_the_objective_alone(row, baseline):
    one, other = composed(row), composed(baseline)
    differing = {key for key in one if one[key] != other[key]}
    assert differing <= {"row", "objective", "variant", "data"}
    if "data" in differing:
        assert {key for key in one.data if one.data[key] != other.data[key]} == {"labelled"}


def test_a_claim_and_its_measured_baseline_differ_in_objective_and_length_alone():
    for model in LEDGER.Models:
        if model.Claim.Baseline.Row is None:
            continue
        one, other = composed(model.Claim.Row), composed(model.Claim.Baseline.Row)
        differing = {key for key in one if one[key] != other[key]}
        assert differing <= {"row", "objective", "variant", "data", "scale"}, model.Claim.Row
        assert "objective" in differing


def measurement(row: str) -> str:
    return hash_of(composed(row))[0]


# Tables 9 and 2 have one row in common.
SAME = {"opera-t9-ft": "opera-ft-vit-b-bs4096-pt300-ft150-top"}


def test_no_two_rows_are_the_same_measurement():
    hashes = {row: measurement(row) for row in FILES if row not in BLOCKED}
    assert all(hashes[one] == hashes[other] for one, other in SAME.items())
    assert len(set(hashes.values())) == len(hashes) - len(SAME)


def test_tasks_on_one_pretraining_share_it():
    rows = ["opera-tr-vit-s-300-cifar-10", "opera-lin-vit-s-300-top", "opera-ft-vit-s-bs1024-pt300-ft100-top"]
    assert len({pretraining_folder(composed(row)).name for row in rows}) == 1
    assert (
        pretraining_folder(composed("opera-lin-vit-s-150-top")).name
        != pretraining_folder(composed(rows[1])).name
    )


@pytest.mark.parametrize("key", ["optim.lrr", "data.sizes", "nothing", "objective.temp"])
def test_unknown_key_is_named_in_one_sentence(key):
    with pytest.raises(UserError, match=key.split(".")[-1]) as error:
        compose("opera", [f"{key}=1"])
    assert "\n" not in str(error.value)
