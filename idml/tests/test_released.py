"""The released Proxy-Anchor, held to arrays that the release computed, and what is wrong with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from idml.losses import build_loss

GOLDEN = 1e-9  # relative, float64
LOSS = {"name": "proxy-anchor", "alpha": 32.0, "margin": 0.1}
METRIC = {"name": "released", "tau": 5.0, "offset": 4.0}


@pytest.fixture(scope="module")
def arrays():
    with np.load(Path(__file__).parent / "golden/idml_proxy_anchor.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def run(arrays, normalize: bool):
    loss = build_loss(LOSS, {**METRIC, "normalize_uncertainty": normalize}, 7, 16).double()
    loss.loss.proxies.data = arrays["param_proxies"].clone()
    semantic = arrays["in_semantic_raw"].clone().requires_grad_()
    uncertainty = arrays["in_uncertainty_raw"].clone().requires_grad_()
    value = loss(torch.cat([semantic, uncertainty], 1), arrays["in_labels"])
    value.backward()
    return value.detach(), semantic.grad, uncertainty.grad, loss.loss.proxies.grad


@pytest.mark.parametrize("normalize, key", [(True, "released_l2norm_uncertainty"), (False, "raw_uncertainty")])
def test_the_released_loss_and_every_gradient_are_the_golden_ones(arrays, normalize, key):
    names = ["out_loss", "grad_semantic", "grad_uncertainty", "grad_proxies"]
    for name, actual in zip(names, run(arrays, normalize), strict=True):
        expected = arrays[f"{name}_{key}"]
        scale = max(float(expected.abs().max()), 1e-6)  # a gradient of zero is rounding, not a scale
        torch.testing.assert_close(actual, expected, rtol=GOLDEN, atol=GOLDEN * scale)


def test_as_released_the_uncertainty_has_no_gradient(arrays):
    assert run(arrays, True)[2].abs().max() < 1e-15
    assert run(arrays, False)[2].abs().max() > 0.1


def test_what_acts_as_released_is_the_length_of_the_proxies(arrays):
    loss = build_loss(LOSS, {**METRIC, "normalize_uncertainty": True}, 7, 16).double()
    embeddings = torch.cat([arrays["in_semantic_raw"], arrays["in_uncertainty_raw"]], 1)
    loss.loss.proxies.data = F.normalize(arrays["param_proxies"], dim=1)
    short = loss(embeddings, arrays["in_labels"])
    loss.loss.proxies.data *= 3
    assert abs(loss(embeddings, arrays["in_labels"]) - short) > 1
