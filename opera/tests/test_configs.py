"""OPERA's rows: what a row and its baseline differ in, and which of them share a pre-training."""

import pytest

from opera.train import pretraining_folder
from shared.claims.compose import repository_root, row_config
from shared.claims.ledger import load_ledger

LEDGER = load_ledger(repository_root(), "opera")
PAIRS = [(row.Row, baseline) for row in LEDGER.own_rows for baseline in row.Baseline]


def composed(row: str):
    return row_config("opera", row, 0)


@pytest.mark.parametrize("row, baseline", PAIRS)
def test_of_the_data_a_row_and_its_baseline_differ_in_the_labelled_part_alone(row, baseline):
    cfg, other = composed(row), composed(baseline)
    assert {key for key in cfg.data if cfg.data[key] != other.data[key]} <= {"labelled"}


@pytest.mark.parametrize("model", LEDGER.Models, ids=lambda model: model.Claim.Row)
def test_a_claimed_row_has_the_backbone_of_its_name(model):
    cfg, claim, said = composed(model.Claim.Row), model.Claim, model.Metadata
    assert (cfg.scale.epochs, cfg.optim.batch_size) == (said["Epochs"], said["Batch Size"])
    words = f"{claim.Source.row} {claim.Row}".lower()
    for name, backbone in (("r50", "resnet50"), ("vit-s", "vit-small"), ("vit-b", "vit-base")):
        if name in words:
            assert cfg.model.backbone == backbone


def test_a_claim_and_its_measured_baseline_differ_in_objective_and_length_alone():
    pairs = [(m.Claim.Row, m.Claim.Baseline.Row) for m in LEDGER.Models if m.Claim.Baseline.Row]
    assert pairs
    for row, baseline in pairs:
        cfg, other = composed(row).copy(), composed(baseline)
        differing = {key for key in cfg if cfg[key] != other[key]}
        if cfg.dense is not None:  # the paper sets batches of 4096 beside one baseline of 1024
            cfg.optim.batch_size = other.optim.batch_size
            differing = {key for key in cfg if cfg[key] != other[key]}
        assert differing <= {"row", "objective", "variant", "data", "scale"}, row
        assert "objective" in differing


def test_tasks_on_one_pretraining_share_it():
    rows = ["opera-tr-vit-s-300-cifar-10", "opera-lin-vit-s-300-top", "opera-ft-vit-s-bs1024-pt300-ft100-top"]
    folders = {pretraining_folder(composed(row)).name for row in rows}
    assert len(folders) == 1 and pretraining_folder(composed("opera-lin-vit-s-150-top")).name not in folders
