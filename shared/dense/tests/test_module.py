"""Rates, groups of parameters and losses are mmengine's, mmdet's and mmseg's, by the configs that the recipes name."""

import numpy as np
import pytest
import torch
from torch import nn

from shared.data.keyed import keyed_bits
from shared.dense import run
from shared.dense.model import build_model, config_of, library_of
from shared.dense.module import STEP, parameter_groups, rate_of
from shared.dense.tests.small import Tiny, dense_config, group, installed, small_config
from shared.errors import UserError

pytestmark = [installed, pytest.mark.slow]
RECIPES = ("mask-rcnn-1x", "mask-rcnn-3x", "mask-rcnn-r50-1x", "mask-rcnn-r50-2x", "upernet", "fcn-r50")
STEPS_AN_EPOCH = 20  # of a small data set
SMALLER = 100  # so many fewer steps than in the recipes for segmentation


def rates_of_mmengine(library, described: list[dict], rate: float, steps: int, steps_an_epoch: int) -> list[float]:
    """Return the rate of every step under mmengine's schedulers."""
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=rate)
    with library.scope():
        schedulers = [PARAM_SCHEDULERS.build(dict(part), default_args={"optimizer": optimizer}) for part in described]
    rates = []
    for step in range(1, steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or step % steps_an_epoch == 0:
                scheduler.step()
    return rates


@pytest.mark.parametrize("name", RECIPES)
def test_rates_are_those_of_mmengines_schedulers_from_the_recipes_own_config(name):
    # mmengine multiplies step by step, which rounds anew every time.
    tolerance = 1e-12
    dense = group(name)
    library = library_of(dense)
    config = library.config(dense.base)
    described = [dict(part) for part in config.param_scheduler]
    base_rate = config.optim_wrapper.optimizer.lr
    if dense.kind == "detection":
        assert dense.epochs == config.train_cfg.max_epochs
        steps = STEPS_AN_EPOCH * int(dense.epochs)
        for part in described:
            if not part["by_epoch"]:
                assert part["end"] == dense.schedule.warmup_steps
                part["end"] = part["end"] // SMALLER
        dense.schedule.warmup_steps //= SMALLER
    else:
        assert dense.steps == config.train_cfg.max_iters
        steps = dense.steps // SMALLER
        for part in described:
            part["begin"], part["end"] = part["begin"] // SMALLER, part["end"] // SMALLER
        dense.schedule.warmup_steps //= SMALLER
    assert dense.optim.lr == base_rate
    expected = rates_of_mmengine(library, described, base_rate, steps, STEPS_AN_EPOCH)
    rates = [base_rate * rate_of(step, steps, dense.epochs, dense.schedule) for step in range(steps)]
    assert len(set(rates)) > 2
    np.testing.assert_allclose(rates, expected, rtol=0, atol=tolerance * base_rate)


class Named(nn.Module):
    """A backbone whose parameters have the names that the recipes treat apart, and others."""

    channels = (8, 8, 8, 8)

    def __init__(self):
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.patch_norm, self.bn1, self.head = nn.LayerNorm(8), nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Return rate and weight decay of every parameter that is trained."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = [
        (names[id(parameter)], (part["lr"], part["weight_decay"]))
        for part in groups
        for parameter in part["params"]
        if parameter.requires_grad
    ]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_has_the_rate_and_the_decay_that_mmengine_gives_it(name, tmp_path):
    from mmengine.optim import build_optim_wrapper

    dense = dense_config(name, tmp_path).dense
    library = library_of(dense)
    config = config_of(library, dense, Named.channels)
    model = build_model(library, config, Named())
    wrapper = build_optim_wrapper(model, config.optim_wrapper.copy())
    expected = by_name(model, wrapper.param_groups)
    groups = parameter_groups(model, dense.optim)
    assert by_name(model, groups) == expected and len(expected) > 20
    assert {part["weight_decay"] for part in groups} == (
        {0.0, dense.optim.weight_decay} if dense.optim.no_decay else {dense.optim.weight_decay}
    )
    optimizer = wrapper.optimizer
    assert {"AdamW": "adamw", "SGD": "sgd"}[type(optimizer).__name__] == dense.optim.name
    if dense.optim.name == "sgd":
        assert optimizer.defaults["momentum"] == dense.optim.momentum
    else:
        assert optimizer.defaults["betas"] == (0.9, 0.999)  # torch's own, which we take


def batch_of(cfg, batches) -> dict:
    return next(iter(batches.train_dataloader()))


def test_the_loss_of_a_batch_is_the_mean_of_its_groups_losses_by_mmdet(tmp_path):
    # A sum of four numbers in another order, single precision.
    tolerance = 1e-6
    cfg = small_config("detection", tmp_path)
    module, batches = run.prepare(cfg, Tiny())
    module.train()
    batch, model = batch_of(cfg, batches), module.model
    loss = module.loss(batch, 5)
    losses, number_of_groups = [], cfg.dense.optim.batch_size // cfg.dense.optim.group
    for number in range(number_of_groups):
        part = {name: values[number::number_of_groups] for name, values in batch.items()}
        assert len(part["inputs"]) == cfg.dense.optim.group == 2
        torch.manual_seed(int(keyed_bits(STEP, cfg.seed, 5, number)) >> 1)
        data = model.data_preprocessor(part, True)
        parts = model.loss(data["inputs"], data["data_samples"])
        total = sum(value.mean() for key in parts if "loss" in key for value in listed(parts[key]))
        losses.append(total)
    losses = torch.stack(losses)  # one a group
    assert len(set(losses.tolist())) == number_of_groups
    torch.testing.assert_close(loss, losses.mean(), rtol=tolerance, atol=0)


def listed(parts) -> list:
    return parts if isinstance(parts, list) else [parts]


def test_the_loss_of_a_segmenter_is_mmsegs_on_the_whole_batch(tmp_path):
    tolerance = 1e-6
    cfg = small_config("segmentation", tmp_path)
    module, batches = run.prepare(cfg, Tiny())
    module.train()
    batch, model = batch_of(cfg, batches), module.model
    loss = module.loss(batch, 5)
    torch.manual_seed(int(keyed_bits(STEP, cfg.seed, 5, 0)) >> 1)
    parts = model.loss(**model.data_preprocessor(batch, True))
    expected = parts["decode.loss_ce"] + parts["aux.loss_ce"]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)


def test_the_draws_of_a_step_are_a_function_of_the_seed_and_the_step(tmp_path):
    cfg = small_config("segmentation", tmp_path)
    module, batches = run.prepare(cfg, Tiny())
    module.train()
    batch = batch_of(cfg, batches)
    first = module.loss(batch, 5).item()
    torch.rand(7)
    assert module.loss(batch, 5).item() == first != module.loss(batch, 6).item()


@pytest.mark.parametrize(("ranks", "size", "group_size"), [(3, 16, 2), (2, 6, 6), (4, 8, 4)])
def test_ranks_that_would_cut_a_group_are_refused(monkeypatch, tmp_path, ranks, size, group_size):
    changes = {"dense.optim.batch_size": size, "dense.optim.group": group_size}
    module, _ = run.prepare(small_config("detection", tmp_path, changes), Tiny())
    monkeypatch.setattr("shared.dense.module.world_size", lambda: ranks)
    with pytest.raises(
        UserError, match=rf"groups of {group_size} images cannot be shared by {ranks} ranks: use a number"
    ):
        module.groups_of(size // ranks)
