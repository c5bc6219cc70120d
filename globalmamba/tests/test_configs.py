"""GlobalMamba's rows: what a claimed row and its baseline differ in, and what a seed changes."""

import pytest

from globalmamba.released import released_rows, require_release
from shared.claims.compose import row_config, row_names
from shared.claims.protocol import load_paper
from shared.environment import repository_root
from shared.errors import UserError
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


# The scripts: rate behind linear scaling, images a step, decay, stochastic depth (wangck20/GlobalMamba's tiny.sh and
# small.sh, hustvl/Vim's pt-vim-t.sh and pt-vim-s.sh); and the network: width, mixer.
SCRIPTS = {
    "gm-in1k-m-released": (2e-3, 2048, 0.1, 0.0, 192, "causal"),
    "gm-in1k-tstar-released": (8e-3, 2048, 0.05, 0.05, 384, "causal"),
    "in1k-vim-t-script": (1e-3, 1024, 0.1, 0.0, 192, "bidirectional"),
    "in1k-vim-s-script": (1e-3, 512, 0.05, 0.05, 384, "bidirectional"),
}


def test_a_released_row_is_what_its_script_trains():
    assert released_rows() == list(SCRIPTS)
    for row, expected in SCRIPTS.items():
        cfg = composed(row)
        network, optim = cfg.model.network, cfg.optim
        script = optim.lr, optim.batch_size, optim.weight_decay, network.drop_path, network.embed_dim, network.mixer
        assert script == expected, row
        assert (network.class_token, network.initialisation, network.depth) == ("middle", "vim", 24)
        assert (optim.warmup_epochs, optim.warmup_lr, optim.min_lr, optim.clip_norm) == (5, 1e-6, 1e-5, None)
        assert (optim.decay_a_log, optim.schedule, optim.precision) == (True, "epoch-lagged", "32-true")


def test_one_switch_changes_tokens_and_mixer_of_a_claimed_row():
    cfg = row_config("globalmamba", "gm-in1k-m", 0, ("variant=as_released",))
    require_release(cfg)
    own = composed("gm-in1k-m-released")
    assert all(cfg[key] == own[key] for key in cfg if key != "row")
    assert cfg.model.tokens.variant == "as_released"


@pytest.mark.parametrize("row", ["gm-in1k-t", "gm-in1k-b", "in1k-vmamba-s", "cifar10-gm-pyramid", "cifar10-gm"])
def test_pyramids_and_small_networks_were_never_released(row):
    with pytest.raises(UserError, match="is not implemented for a network like"):
        require_release(row_config("globalmamba", row, 0, ("variant=as_released",)))


CAUSAL = [
    row for row in row_names(load_paper(repository_root(), "globalmamba")) if "causal-" in row or "-causal" in row
]


def test_the_class_token_is_last_in_every_causal_row_of_vim_but_the_releases_own():
    rows = [row for row in CAUSAL if "transformer" not in row]
    assert {"cifar10-vim-causal", "cifar10-gm-causal", "cifar10-causal-random", "gm-in1k-m-causal-high-low"} <= set(
        rows
    )
    networks = {row: composed(row).model.network for row in rows}
    assert {(network.mixer, network.class_token) for network in networks.values()} == {("causal", "last")}


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
