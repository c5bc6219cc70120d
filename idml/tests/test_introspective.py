"""The metric: its formula, its limits, its gradients, and that the losses' libraries take it."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance

from idml.introspective import COMBINATIONS, SCALINGS, IntrospectiveDistance, IntrospectiveSimilarity
from shared.errors import UserError

S, U = 5, 3
EXACT = 1e-12  # float64, the same few operations in another order


def metric(kind=IntrospectiveDistance, scaling="rms", combination="sum", offset=0.0, **options):
    return kind(S, tau=5.0, offset=offset, scaling=scaling, combination=combination, **options)


def rows(n: int, width: int = S + U, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(x, y, scaling, combination, offset) -> float:
    """D_IN^2 of two rows as plain numbers, written from the formula."""

    def parts(row):
        length = math.hypot(*row[:S])
        uncertainty = list(row[S:])
        if scaling == "rms":
            uncertainty = [value / math.sqrt(U) for value in uncertainty]
        if scaling == "unit" and uncertainty:
            uncertainty = [value / math.hypot(*uncertainty) for value in uncertainty]
        return [value / length for value in row[:S]], uncertainty

    (m, u), (p, w) = parts(x), parts(y)
    alpha = sum((a - b) ** 2 for a, b in zip(m, p, strict=True))
    if not w:
        beta = sum(a * a for a in u)
    elif combination == "product":
        beta = math.hypot(*u) * math.hypot(*w)
    else:
        sign = 1 if combination == "sum" else -1
        beta = sum((a + sign * b) ** 2 for a, b in zip(u, w, strict=True))
    return alpha * math.exp(-(beta + offset) / (5 * alpha))


@pytest.mark.parametrize("offset", [0.0, 4.0])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("width", [S + U, S], ids=["samples", "proxies"])
def test_the_distance_is_its_formula(scaling, combination, offset, width):
    x, y = rows(4), rows(3, width, seed=1)
    expected = torch.tensor(
        [[by_definition(a, b, scaling, combination, offset) for b in y.tolist()] for a in x.tolist()],
        dtype=torch.float64,
    )
    squared = metric(scaling=scaling, combination=combination, offset=offset, power=2)(x, y)
    torch.testing.assert_close(squared, expected, rtol=EXACT, atol=EXACT)
    similarity = metric(IntrospectiveSimilarity, scaling, combination, offset)(x, y)
    torch.testing.assert_close(similarity, 1 - expected / 2, rtol=EXACT, atol=EXACT)


def test_a_network_that_is_sure_measures_with_the_metric_of_the_baseline():
    x = rows(6)
    x[:, S:] = 0
    plain = LpDistance()(x[:, :S])
    torch.testing.assert_close(metric()(x).fill_diagonal_(0), plain.fill_diagonal_(0))
    torch.testing.assert_close(metric(IntrospectiveSimilarity)(x), CosineSimilarity()(x[:, :S]))
    torch.testing.assert_close(metric()(x[:, :S], rows(2, S, 1)), LpDistance()(x[:, :S], rows(2, S, 1)))


def test_uncertainty_brings_a_pair_together_and_never_beyond_the_range():
    x = rows(6)
    x[:, S:].abs_()  # of one sign: two that point against each other would cancel in the sum
    previous = metric()(x)
    assert previous.max() <= 2
    for _ in range(4):
        x[:, S:] *= 2
        distance = metric()(x)
        assert (distance <= previous).all() and (distance >= 0).all()
        previous = distance
    assert distance.fill_diagonal_(0).max() < 0.3


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("width", [S + U, S], ids=["samples", "proxies"])
@pytest.mark.parametrize("kind", [IntrospectiveDistance, IntrospectiveSimilarity])
def test_gradients(kind, combination, width):
    x, y = rows(3).requires_grad_(), rows(2, width, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(metric(kind, combination=combination), (x, y))


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("uncertainty", [0.0, 1e-3, 1.0, 1e6])
def test_pairs_of_the_same_place_and_boundless_uncertainty_have_finite_gradients(combination, uncertainty):
    x = rows(4).float()
    x[1, :S] = x[0, :S]
    x[:, S:] *= uncertainty
    x.requires_grad_()
    distance = metric(combination=combination)(x)
    distance.sum().backward()
    assert distance.isfinite().all() and x.grad.isfinite().all()


def test_the_released_scaling_to_a_proxy_gives_the_uncertainty_no_gradient_and_the_default_does():
    for scaling, acts in [("unit", False), ("rms", True), ("raw", True)]:
        x = rows(4).requires_grad_()
        metric(scaling=scaling)(x, rows(2, S, 1)).sum().backward()
        assert bool(x.grad[:, S:].abs().max() > 1e-9) == acts


def test_the_width_of_the_uncertainty_does_not_change_its_scale():
    narrow = rows(4, S + 1)
    wide = torch.cat([narrow[:, :S], narrow[:, S:].expand(-1, 7)], 1)
    torch.testing.assert_close(metric()(narrow), metric()(wide))


@pytest.mark.parametrize("values", [{"scaling": "log"}, {"combination": "mean"}, {"tau": 0.0}, {"offset": -1.0}])
def test_values_that_mean_nothing_are_refused(values):
    arguments = {"tau": 5.0, "offset": 0.0, "scaling": "rms", "combination": "sum", **values}
    with pytest.raises(UserError, match=f"metric.{next(iter(values))}="):
        IntrospectiveDistance(S, **arguments)
