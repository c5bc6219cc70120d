"""``variant=as_released``: one switch for network, start, decay, schedule, rate and batch, refused for all else."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from shared.claims.compose import compose, row_config
from shared.errors import UserError

from .. import train
from ..module import A_LOG, lagged_rate, parameter_groups
from ..released import PAPER, released_rows, require_release, values
from .small import BATCHES_AN_EPOCH, small_config

RELEASED = released_rows()
OWN = RELEASED[0]  # of the paper's release, its tiny.sh


def released(*overrides: str):
    return compose(PAPER, ["variant=as_released", *overrides])


def test_the_lagged_schedule_is_that_of_the_scripts():
    """timm's scheduler with the scripts' arguments, stepped behind every epoch for it, as their main.py does."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    expected = []
    for epoch in range(300):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    rates = [lagged_rate(epoch, 300, 5, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5) for epoch in range(300)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[0] == rates[1] == 1e-6 and max(rates) == rates[6] < 1e-3


def test_a_lagged_run_keeps_one_rate_through_every_epoch(tmp_path):
    overrides = ["optim.schedule=epoch-lagged", "optim.warmup_epochs=1"]
    cfg = small_config(tmp_path, *overrides, steps=4 * BATCHES_AN_EPOCH)
    module, _ = train.prepare(cfg)
    optimizer = module.configure_optimizers()["optimizer"]
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.optim.warmup_lr}
    rates = [[module.rate(epoch * BATCHES_AN_EPOCH + i) for i in range(BATCHES_AN_EPOCH)] for epoch in range(4)]
    assert all(len(set(epoch)) == 1 for epoch in rates)
    o = cfg.optim
    expected = [lagged_rate(epoch, 4, 1, o.lr, o.warmup_lr, o.min_lr) for epoch in range(4)]
    assert [epoch[0] for epoch in rates] == expected and expected[0] == expected[1] < expected[3] < expected[2]


def test_an_unknown_schedule_is_refused(tmp_path):
    with pytest.raises(UserError, match="optim.schedule 'weekly' is unknown: choose one of step, epoch-lagged"):
        train.prepare(small_config(tmp_path, "optim.schedule=weekly"))


def test_the_scripts_decay_the_logarithms_of_a_and_nothing_else_of_what_is_spared(tmp_path):
    module, _ = train.prepare(small_config(tmp_path, "optim.decay_a_log=true"))
    names = {parameter: name for name, parameter in module.model.named_parameters()}

    def decayed(groups) -> set[str]:
        return {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}

    as_here, as_there = decayed(parameter_groups(module.model, 0.1)), decayed(parameter_groups(module.model, 0.1, True))
    logarithms = {name for name in names.values() if A_LOG.fullmatch(name.rpartition(".")[2])}
    assert "layers.0.mixer.A_log" in logarithms and len(logarithms) == 4  # two passes in each of two blocks
    assert as_there == as_here | logarithms and not as_here & logarithms
    assert decayed(module.configure_optimizers()["optimizer"].param_groups) == as_there


def test_one_switch_gives_the_releases_network_and_script():
    cfg = released()
    assert values(cfg) == values(row_config(PAPER, OWN, 0))
    assert (cfg.variant, cfg.optim.decay_a_log, cfg.optim.schedule) == ("as_released", True, "epoch-lagged")
    assert cfg.model.network.initialisation == "vim"
    require_release(cfg)


@pytest.mark.parametrize("row", RELEASED)
def test_released_rows_are_run_with_any_seed(row):
    cfg = row_config(PAPER, row, 3)
    assert (cfg.variant, cfg.scale.name, cfg.optim.decay_a_log) == ("as_released", "full", True)
    require_release(cfg)


@pytest.mark.parametrize(
    "override, wrong",
    [
        ("optim.lr=1", "optim.lr"),
        ("optim.batch_size=64", "optim.batch_size .* instead of 64"),
        ("optim.schedule=step", "optim.schedule epoch-lagged instead of step"),
        ("optim.decay_a_log=false", "optim.decay_a_log True instead of False"),
        ("model.network.initialisation=mamba", "model.network.initialisation vim instead of mamba"),
        ("model.network.mlp_ratio=4", "model.network.mlp_ratio 0.0 instead of 4"),
    ],
)
def test_settings_that_contradict_the_release_are_refused_in_one_sentence(override, wrong):
    with pytest.raises(UserError, match=f"contradicts other settings: {OWN}.* has .*{wrong}") as error:
        require_release(released(override))
    assert "\n" not in str(error.value) and "or variant=as_written" in str(error.value)


def test_as_written_is_asked_for_nothing():
    require_release(compose(PAPER, ["model.network.depth=1", "optim.lr=1"]))


@pytest.mark.parametrize("override", ["model.network.depth=8", "model.network.embed_dim=96", "model=vmamba-t"])
def test_a_network_that_nobody_released_is_refused_in_one_sentence(override):
    with pytest.raises(
        UserError, match=f"is not implemented for a network like .*: choose one of the rows {OWN}"
    ) as error:
        require_release(released(override))
    assert "\n" not in str(error.value)
