"""V2M's rows: what a claimed row and its baseline differ in, what small networks hold, when a scan gets gradient."""

import pytest

from shared.claims.compose import repository_root, row_config, row_names
from shared.claims.ledger import load_ledger
from shared.claims.protocol import load_paper
from shared.training.config import hash_of
from v2m.model import count
from v2m.tests.contract import LATE, toy
from v2m.train import prepare

LEDGER = load_ledger(repository_root(), "v2m")
CLAIMED = {model.Claim.Row: model.Claim.Baseline.Row for model in LEDGER.Models if model.Claim.Baseline.Row}
NAMES = row_names(load_paper(repository_root(), "v2m"))


def composed(row: str):
    return row_config("v2m", row, 0)


def test_every_network_of_the_papers_table_has_a_baseline():
    assert CLAIMED == {
        "v2m-in1k-t": "v2m-in1k-vim-t",
        "v2m-in1k-s": "v2m-in1k-vim-s",
        "v2m-in1k-t-lw": "v2m-in1k-localvim-t",
        "v2m-in1k-s-lw": "v2m-in1k-localvim-s",
        "v2m-in1k-sstar": "v2m-in1k-vmamba-t",
        "v2m-in1k-bstar": "v2m-in1k-vmamba-s",
    }


@pytest.mark.parametrize("row", CLAIMED)
def test_claimed_row_differs_from_the_baseline_of_the_paper_in_the_network_only(row):
    cfg, other = composed(row), composed(CLAIMED[row])
    assert {key for key in cfg if cfg[key] != other[key]} == {"row", "model"}


PAIRS = [(row.Row, baseline) for row in LEDGER.own_rows for baseline in row.Baseline]


@pytest.mark.parametrize("row, baseline", PAIRS)
def test_only_a_comparison_at_equal_time_differs_in_its_length(row, baseline):
    assert (composed(row).scale != composed(baseline).scale) == ("-time" in row + baseline)


@pytest.mark.parametrize("data", ["cifar10", "cifar10-all", "tiny32", "imagenette"])
def test_small_networks_have_the_parameters_of_vim_within_two_percent(data):
    vim = count(composed(f"v2m-{data}-vim"))["parameters"]
    rows = [row for row in NAMES if row.startswith(f"{data}-v2m")]
    assert rows
    for row in rows:
        assert count(composed(row))["parameters"] == pytest.approx(vim, rel=0.02), row


@pytest.mark.parametrize("row", [*CLAIMED, *CLAIMED.values()])
def test_a_full_row_asks_for_eight_devices(row):
    trainer = composed(row).trainer
    assert (trainer.devices, trainer.strategy, trainer.workers) == (8, "ddp", 10)


def test_nine_rows_of_dense_tasks_are_blocked():
    assert sum(model.Claim.Status == "blocked" for model in LEDGER.Models) == 9


def test_a_deeper_network_is_another_measurement():
    cfg = composed("digits-v2m")
    before = hash_of(cfg)
    cfg.model.network.depth += 1
    assert hash_of(cfg) != before


@pytest.mark.parametrize("row", [row for row in NAMES if "roesser" in row])
def test_every_parameter_of_the_general_recurrence_has_gradient_from_the_second_step_on(row):
    cfg = composed(row)
    toy(cfg)
    module, data = prepare(cfg)
    batch = next(iter(data.train_dataloader()))
    optimizer = module.configure_optimizers()["optimizer"]
    without = []
    for _ in range(2):
        optimizer.zero_grad()
        module.loss(batch, 0).backward()
        parameters = module.model.named_parameters()
        without.append({name for name, p in parameters if p.grad is None or not p.grad.count_nonzero()})
        optimizer.step()
    assert without == [LATE, set()]
