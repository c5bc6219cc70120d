"""GlobalMamba's rows: what a claimed row and its baseline differ in, and what a seed changes."""

import pytest

from shared.claims.compose import row_config
from shared.training.config import hash_of

CLAIMED = {"gm-in1k-m": "in1k-vim-t", "gm-in1k-tstar": "in1k-vim-s"}
CLAIMED |= {f"gm-in1k-{size}": f"in1k-vmamba-{size}" for size in "tsb"}


def composed(row: str):
    return row_config("globalmamba", row, 0)


@pytest.mark.parametrize("row", CLAIMED)
def test_claimed_row_differs_from_the_baseline_of_the_paper_in_the_tokens_only(row):
    cfg, other = composed(row), composed(CLAIMED[row])
    assert {key for key in cfg if cfg[key] != other[key]} == {"row", "model"}
    common = {key for key in other.model.network if key != "_target_"}
    assert all(cfg.model.network[key] == other.model.network[key] for key in common)


@pytest.mark.parametrize("row", [*CLAIMED, *CLAIMED.values()])
def test_a_full_row_asks_for_eight_devices(row):
    trainer = composed(row).trainer
    assert (trainer.devices, trainer.strategy, trainer.workers) == (8, "ddp", 10)


def test_a_random_order_is_another_one_for_every_seed():
    seeds = range(3)
    orders = [row_config("globalmamba", "cifar10-gm-random", seed).model.tokens.order_seed for seed in seeds]
    assert orders == [0, 1, 2]


def test_a_deeper_network_is_another_measurement():
    cfg = composed("digits-gm").copy()
    before = hash_of(cfg)
    cfg.model.network.depth += 1
    assert hash_of(cfg) != before
