"""IDML's rows: what a row and its baseline differ in, which rows a loss has, and where weights come from."""

import hashlib

import pytest

from idml.losses import BUILDERS
from idml.model import weights_of
from idml.tests.contract import DEAD, prepare, toy
from shared.claims.compose import repository_root, row_config, row_names
from shared.claims.ledger import load_ledger
from shared.claims.protocol import load_paper
from shared.errors import UserError
from shared.training.config import hash_of

LEDGER = load_ledger(repository_root(), "idml")
NAMES = row_names(load_paper(repository_root(), "idml"))
PAIRS = [(row.Row, baseline) for row in LEDGER.own_rows for baseline in row.Baseline]
PAIRS += [(model.Claim.Row, model.Claim.Baseline.Row) for model in LEDGER.Models if model.Claim.Baseline.Row]


def composed(row: str):
    return row_config("idml", row, 0)


@pytest.mark.parametrize("row, baseline", PAIRS)
def test_row_differs_from_its_baseline_in_metric_and_mixtures_only(row, baseline):
    cfg, other = composed(row), composed(baseline)
    differing = {key for key in cfg if cfg[key] != other[key]}
    assert differing <= {"row", "metric", "objective", "model", "variant"}
    if "model" in differing:
        assert {key for key in cfg.model if cfg.model[key] != other.model[key]} == {"uncertainty_dim"}


@pytest.mark.parametrize("loss", BUILDERS)
@pytest.mark.parametrize("data", ["cub50", "cars196t", "cub", "cars196", "sop"])
def test_every_loss_has_its_baseline_its_control_and_its_introspective_row(data, loss):
    kinds = set()
    for row in NAMES:
        cfg = composed(row)
        if cfg.data.task == "retrieval" and cfg.loss.name == loss and data in row.split("-"):
            kinds.add((cfg.metric.name, cfg.objective.mixup_alpha is not None))
    assert {("plain", False), ("plain", True), ("introspective", True)} <= kinds
    assert (("released", True) in kinds) == (loss == "proxy-anchor")


def test_the_path_of_weights_changes_no_hash():
    cfg = composed("idml-pa-cub")
    before = hash_of(cfg)
    cfg.paths.weights = "elsewhere.pth"
    assert hash_of(cfg) == before


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


def test_the_released_loss_gives_the_head_of_the_uncertainty_no_gradient_beyond_rounding(tmp_path):
    rows = [row for row in NAMES if composed(row).metric.name == "released"]
    assert rows
    for row in rows:
        cfg = composed(row)
        toy(cfg)
        training = prepare(cfg, tmp_path)
        training.module.train().loss(next(iter(training.data.train_dataloader())), 0).backward()
        parameters = dict(training.module.model.named_parameters())
        assert all(parameters[name].grad.abs().max() < 1e-6 for name in DEAD), row
