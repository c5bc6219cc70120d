"""V2M's rows: what a claimed row and its baseline differ in, what small networks hold, when a scan gets gradient."""

import pytest
from omegaconf import OmegaConf

from shared.claims.compose import repository_root, row_config, row_names
from shared.claims.ledger import load_ledger
from shared.claims.protocol import load_paper
from shared.errors import UserError
from shared.training.config import hash_of
from v2m.model import count
from v2m.released import released_rows, require_release
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
        "v2m-coco-sstar-1x-ap": "v2m-coco-vmamba-t-1x",
        "v2m-coco-sstar-3x-ap": "v2m-coco-vmamba-t-3x",
        "v2m-coco-bstar-1x-ap": "v2m-coco-vmamba-s-1x",
        "v2m-coco-bstar-3x-ap": "v2m-coco-vmamba-s-3x",
        "v2m-ade-sstar": "v2m-ade-vmamba-t",
        "v2m-ade-bstar": "v2m-ade-vmamba-s",
        "v2m-ade-t-lw": "v2m-ade-localvim-t",
        "v2m-ade-s-lw": "v2m-ade-localvim-s",
    }


@pytest.mark.parametrize("row", CLAIMED)
def test_claimed_row_differs_from_the_baseline_of_the_paper_in_the_network_only(row):
    cfg, other = composed(row).copy(), composed(CLAIMED[row]).copy()
    if cfg.dense is not None:
        assert (cfg.dense.pretraining, other.dense.pretraining) in CLAIMED.items()
        cfg.dense.pretraining = other.dense.pretraining = None
    assert {key for key in cfg if cfg[key] != other[key]} == {"row", "model"}


PAIRS = [(row.Row, baseline) for row in LEDGER.own_rows for baseline in row.Baseline]


@pytest.mark.parametrize("row, baseline", PAIRS)
def test_only_a_comparison_at_equal_time_differs_in_its_length(row, baseline):
    assert (composed(row).scale != composed(baseline).scale) == ("-time" in row + baseline)


# The scripts: rate behind linear scaling, images a step, decay, stochastic depth (wangck20/V2M's tiny.sh and small.sh,
# hustvl/Vim's pt-vim-t.sh and pt-vim-s.sh, hunto/LocalMamba's configuration and command); and the network's width.
SCRIPTS = {
    "v2m-in1k-t-released": (5e-4, 512, 0.1, 0.0, 192),
    "v2m-in1k-s-released": (1e-3, 512, 0.05, 0.05, 384),
    "v2m-in1k-vim-t-script": (1e-3, 1024, 0.1, 0.0, 192),
    "v2m-in1k-vim-s-script": (1e-3, 512, 0.05, 0.05, 384),
    "v2m-in1k-localvim-t-script": (1e-3, 1024, 0.04, 0.1, 192),
}


def test_a_released_row_is_what_its_script_trains():
    assert released_rows() == list(SCRIPTS)
    for row, expected in SCRIPTS.items():
        cfg = composed(row)
        network, optim = cfg.model.network, cfg.optim
        script = optim.lr, optim.batch_size, optim.weight_decay, network.drop_path, network.embed_dim
        assert script == expected and optim.decay_a_log and optim.clip_norm is None, row
        if "localvim" not in row:
            assert (network.initialisation, network.depth, optim.schedule) == ("vim", 24, "epoch-lagged")
            assert (optim.warmup_epochs, optim.warmup_lr, optim.min_lr) == (5, 1e-6, 1e-5)
    mixers = [composed(row).model.network.mixer._target_.rsplit(".")[-1] for row in SCRIPTS]
    assert mixers == ["ReleasedMixer", "ReleasedMixer", "VimMixer", "VimMixer", "LocalVimMixer"]
    local = composed("v2m-in1k-localvim-t-script")
    assert (local.model.network.initialisation, local.optim.schedule, local.optim.warmup_epochs) == (
        "local_vim",
        "step",
        20,
    )
    assert (local.augment.mixup_alpha, local.augment.repeats, local.optim.ema_decay) == (0.2, 1, None)


@pytest.mark.parametrize("row", ["v2m-in1k-sstar", "v2m-in1k-bstar", "v2m-in1k-t-lw", "cifar10-v2m-released"])
def test_pyramids_local_windows_and_small_networks_were_never_released(row):
    with pytest.raises(UserError, match="is not implemented for a network like"):
        require_release(row_config("v2m", row, 0, ("variant=as_released",)))


def test_v2ms_mixer_as_written_is_refused_as_released_with_the_row_that_is():
    with pytest.raises(
        UserError, match="is not implemented for a network like V2M-T: choose one of the rows v2m-in1k-t-released"
    ):
        require_release(row_config("v2m", "v2m-in1k-t", 0, ("variant=as_released",)))


@pytest.mark.parametrize(
    "row, key, value",
    [
        ("v2m-in1k-t-rotated", "mixer.order", "rotated"),
        ("cifar10-v2m-rotated", "mixer.order", "rotated"),
        ("v2m-in1k-t-joined", "_target_", "v2m.joined.JoinedVim"),
        ("cifar10-v2m-joined", "_target_", "v2m.joined.JoinedVim"),
    ],
)
def test_the_readings_of_the_rotations_and_of_the_figure_are_rows(row, key, value):
    network = composed(row).model.network
    assert OmegaConf.select(network, key) == value
    if "joined" in row:
        assert (network.join, network.mixer.corners, network.class_token) == ("channels", 1, "mean")


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
