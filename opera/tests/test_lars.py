"""LARS, held to five steps that MoCo-v3's optimiser made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from opera.lars import LARS
from shared.errors import UserError

GOLDEN = {"rtol": 1e-9, "atol": 1e-12}  # float64


@pytest.fixture(scope="module")
def arrays():
    with np.load(Path(__file__).parent / "golden/opera_lars.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_five_steps_are_the_golden_ones(arrays):
    weight, bias = (nn.Parameter(arrays[f"in_{name}"].clone()) for name in "wb")
    optimizer = LARS([weight, bias], lr=0.3, weight_decay=1e-2, momentum=0.9)
    for step in range(5):
        weight.grad, bias.grad = (arrays[f"in_g{name}{step}"].clone() for name in "wb")
        optimizer.step()
        torch.testing.assert_close(weight.detach(), arrays[f"out_w{step}"], **GOLDEN)
        torch.testing.assert_close(bias.detach(), arrays[f"out_b{step}"], **GOLDEN)


def test_a_step_of_a_matrix_has_the_length_that_trust_gives_it():
    weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    before = weight.detach().clone()
    weight.grad = 1000 * torch.randn(4, 5, dtype=torch.float64)
    LARS([weight], lr=1.0, trust=0.01).step()
    torch.testing.assert_close((weight - before).norm().detach(), 0.01 * before.norm())


def test_a_matrix_of_zeros_takes_the_gradient_as_it_is():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.5, weight_decay=0.1).step()
    assert weight.equal(torch.full((2, 2), -0.5))


def test_parameters_without_a_gradient_stay():
    weight = nn.Parameter(torch.ones(2, 2))
    LARS([weight], lr=0.5, weight_decay=0.1).step()
    assert weight.equal(torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "trust"])
def test_negative_values_are_refused(name):
    with pytest.raises(UserError, match=f"{name}=-1 must not be negative"):
        LARS([nn.Parameter(torch.ones(1))], **({"lr": 1} | {name: -1}))
