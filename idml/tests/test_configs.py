"""Every experiment of IDML composes, stands in the ledger, and runs a step at toy size with all parameters."""

import hashlib

import pytest

from idml import classification
from idml.losses import BUILDERS
from idml.model import weights_of
from idml.train import prepare
from shared.claims.compose import compose, config_folder, hash_of, repository_root, row_config, row_overrides
from shared.claims.ledger import load_ledger
from shared.claims.reproduce import rows_of
from shared.errors import UserError

FILES = sorted(path.stem for path in (config_folder("idml") / "experiment").glob("*.yaml"))
LEDGER = load_ledger(repository_root(), "idml")
SCALE_OF = {row.Row: s for s in ("demo", "lite", "full") for row in getattr(LEDGER, s.capitalize())}
SCALE_OF |= {model.Claim.Row: "full" for model in LEDGER.Models}
OWN = [*LEDGER.Lite, *LEDGER.Demo, *LEDGER.Full]
SMALL = {"optim.batch_size": 16, "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.workers": 0}
RETRIEVAL = {
    "data.manifest": "digits",
    "data.image_size": 8,
    "data.held_out": 0.0,
    "selection": "last-epoch",
    "model.backbone": "convnet-tiny",
    "model.pretrained": False,
}
CLASSIFICATION = {
    "data.manifest": "digits",
    "data.image_size": 8,
    "data.classes": 10,
    "data.train_images": None,
    "model.backbone": "convnet-tiny",
    "model.pretrained": False,
}
# The released loss gives the head of the uncertainty no gradient.
DEAD = {"uncertainty.weight", "uncertainty.bias"}


def composed(row: str):
    return row_config("idml", row, 0)


def toy(row: str):
    """Return the config of a row with a tiny network on the digits; everything else is its own."""
    cfg = composed(row)
    changes = CLASSIFICATION if cfg.data.task == "classification" else RETRIEVAL
    for key, value in (SMALL | changes).items():
        *groups, name = key.split(".")
        node = cfg
        for group in groups:
            node = node[group]
        node[name] = value
    return cfg


def test_ledger_and_experiment_files_hold_the_same_rows():
    assert sorted(SCALE_OF) == FILES
    assert {row for scale in ("demo", "lite", "full") for row in rows_of("idml", scale)} == set(FILES)


@pytest.mark.parametrize("row", FILES)
def test_experiment_composes_to_its_own_row_and_says_what_it_is_and_how_it_is_run(row):
    cfg = composed(row)
    assert (cfg.row, cfg.paper, cfg.scale.name) == (row, "idml", SCALE_OF[row])
    lines = (config_folder("idml") / "experiment" / f"{row}.yaml").read_text().splitlines()
    head = [line for line in lines[: lines.index("defaults:")] if line.startswith("# ")]
    assert head[0] == "# @package _global_"
    assert head[-1].startswith(f"# make reproduce-idml SCALE={SCALE_OF[row]} ROWS={row}")
    words = " ".join(head)
    assert "Expected:" in words or "Ours, no row of the paper" in words or row.startswith("choice")


@pytest.mark.parametrize("row", FILES)
def test_experiment_takes_a_step_at_toy_size_and_every_parameter_gets_gradient_but_of_raw_pairs(row):
    cfg = toy(row)
    if cfg.data.task == "classification":
        module, data, _ = classification.prepare(cfg)
    else:
        module, data, _ = prepare(cfg)
    batch = next(iter(data.train_dataloader()))
    loss = module.train().loss(batch, 0)
    loss.backward()
    assert loss.isfinite()
    parameters = module.model.named_parameters()
    without = {name for name, p in parameters if p.requires_grad and (p.grad is None or not p.grad.any())}
    released = cfg.metric.name == "released"
    if released:  # rounding leaves crumbs
        assert all(dict(module.model.named_parameters())[name].grad.abs().max() < 1e-6 for name in DEAD)
    if row.startswith("choice-raw"):
        # Unscaled, the uncertainty of a fresh network brings every pair to distance 0: nothing pulls any more.
        assert len(without) == len([p for p in module.model.parameters() if p.requires_grad])
    else:
        assert without <= (DEAD if released else set())


@pytest.mark.parametrize("model", LEDGER.Models, ids=lambda model: model.Claim.Row)
def test_claimed_row_is_run_as_the_ledger_says(model):
    cfg, claim, said = composed(model.Claim.Row), model.Claim, model.Metadata
    assert (cfg.selection, cfg.variant) == (claim.Selection, claim.Variant)
    assert list(cfg.launcher.seeds) == claim.Seeds
    assert (cfg.scale.epochs, cfg.optim.batch_size) == (said.epochs, said.batch_size)


PAIRS = [(row.Row, other) for row in OWN for other in row.Baseline]
PAIRS += [(m.Claim.Row, m.Claim.Baseline.Row) for m in LEDGER.Models if m.Claim.Baseline.Row]


@pytest.mark.parametrize("row, baseline", PAIRS)
def test_row_differs_from_its_baseline_in_metric_and_mixtures_only(row, baseline):
    one, other = composed(row), composed(baseline)
    differing = {key for key in one if one[key] != other[key]}
    assert differing <= {"row", "metric", "objective", "model", "variant"}
    if "model" in differing:
        assert {key for key in one.model if one.model[key] != other.model[key]} == {"uncertainty_dim"}


@pytest.mark.parametrize("loss", BUILDERS)
@pytest.mark.parametrize("data", ["cub50", "cars196t", "cub", "cars196", "sop"])
def test_every_loss_has_its_baseline_its_control_and_its_introspective_row(data, loss):
    kinds = set()
    for row in FILES:
        cfg = composed(row)
        if cfg.data.task == "retrieval" and cfg.loss.name == loss and data in row.split("-"):
            kinds.add((cfg.metric.name, cfg.objective.mixup_alpha is not None))
    assert {("plain", False), ("plain", True), ("introspective", True)} <= kinds
    assert (("released", True) in kinds) == (loss == "proxy-anchor")


# A claim of another metric of the same run.
SAME = {"idml-pa-cub-r-4": "idml-pa-cub", "idml-pa-cars-r-4": "idml-pa-cars196"}


def test_no_two_rows_are_the_same_measurement():
    hashes = {row: hash_of(composed(row))[0] for row in FILES}
    assert all(hashes[one] == hashes[other] for one, other in SAME.items())
    assert len(set(hashes.values())) == len(hashes) - len(SAME)


def test_seed_reaches_the_config_and_paths_change_no_hash():
    assert row_config("idml", FILES[0], 3).seed == 3
    cfg = composed("idml-pa-cub")
    before = hash_of(cfg)
    cfg.paths.weights = "elsewhere.pth"
    assert hash_of(cfg) == before


@pytest.mark.parametrize("key", ["optim.lrr", "data.sizes", "nothing", "objective.mixup"])
def test_unknown_key_is_named_in_one_sentence(key):
    with pytest.raises(UserError, match=key.split(".")[-1]) as error:
        compose("idml", [f"{key}=1"])
    assert "\n" not in str(error.value)


def test_other_weights_are_another_configuration_and_refused_unless_it_says_so(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    cfg = row_config("idml", "idml-pa-cub", 0, [f"paths.weights={path}"])
    with pytest.raises(UserError, match=f"sha256 {digest}.* resnet50-0676ba61.pth: give that one, or set"):
        weights_of(cfg)
    before = hash_of(cfg)
    cfg.model.weights_sha256 = digest
    assert weights_of(cfg) == str(path) and hash_of(cfg) != before


def test_unknown_row_is_named_with_the_nearest_ones():
    with pytest.raises(UserError, match="'cub50-idml-pb'.*did you mean.*cub50-idml-pa"):
        row_overrides("idml", "cub50-idml-pb", 0, [])
