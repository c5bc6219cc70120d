"""The metric: its formula, its limits, its gradients, and that the losses' libraries take it."""

import math

import pytest
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance

from idml.introspective import COMBINATIONS, FORMS, SCALINGS, IntrospectiveDistance, IntrospectiveSimilarity
from shared.claims.compose import row_config
from shared.errors import UserError

S, U = 5, 3
EXACT = 1e-12  # float64, the same few operations in another order


def metric(
    kind=IntrospectiveDistance, scaling="rms", combination="sum", offset=0.0, form="printed", tau=5.0, **options
):
    return kind(S, form=form, tau=tau, offset=offset, scaling=scaling, combination=combination, **options)


def rows(n: int, width: int = S + U, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(x, y, scaling, combination, offset, form) -> float:
    """D_IN of two rows as plain numbers, written from the formulas."""

    def parts(row):
        length = math.hypot(*row[:S])
        uncertainty = list(row[S:])
        if scaling == "rms":
            uncertainty = [value / math.sqrt(U) for value in uncertainty]
        if scaling == "unit" and uncertainty:
            uncertainty = [value / math.hypot(*uncertainty) for value in uncertainty]
        return [value / length for value in row[:S]], uncertainty

    (m, u), (p, w) = parts(x), parts(y)
    alpha = math.dist(m, p)
    if not w:
        beta = math.hypot(*u)
    elif combination == "product":
        beta = math.sqrt(math.hypot(*u) * math.hypot(*w))
    else:
        sign = 1 if combination == "sum" else -1
        beta = math.hypot(*(a + sign * b for a, b in zip(u, w, strict=True)))
    if form == "printed":
        return alpha * math.exp(-(beta + offset) / (5 * alpha))
    return math.sqrt(alpha**2 * math.exp(-(beta**2 + offset) / (5 * alpha**2)))


@pytest.mark.parametrize("offset", [0.0, 4.0])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("width", [S + U, S], ids=["samples", "proxies"])
@pytest.mark.parametrize("form", FORMS)
def test_the_distance_is_its_formula(scaling, combination, offset, width, form):
    x, y = rows(4), rows(3, width, seed=1)
    expected = torch.tensor(
        [[by_definition(a, b, scaling, combination, offset, form) for b in y.tolist()] for a in x.tolist()],
        dtype=torch.float64,
    )
    distance = metric(scaling=scaling, combination=combination, offset=offset, form=form)(x, y)
    torch.testing.assert_close(distance, expected, rtol=EXACT, atol=1e-6 if form == "squared" else EXACT)  # its root
    squared = metric(scaling=scaling, combination=combination, offset=offset, form=form, power=2)(x, y)
    torch.testing.assert_close(squared, expected**2, rtol=EXACT, atol=EXACT)
    similarity = metric(IntrospectiveSimilarity, scaling, combination, offset, form)(x, y)
    torch.testing.assert_close(similarity, 1 - expected**2 / 2, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("alpha, beta, printed", [(1.0, 1.0, 0.3679), (0.5, 1.0, 0.0677), (2.0, 0.0, 2.0)])
def test_the_printed_form_is_that_of_the_figure_of_the_authors(alpha, beta, printed):
    cfg = row_config("idml", "choice-printed-sum", 0).metric
    angle = 2 * math.asin(alpha / 2)  # of two unit vectors at that distance
    first, second = [torch.zeros(1, S + U, dtype=torch.float64) for _ in range(2)]
    first[0, 0], second[0, :2] = 1, torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    first[0, S:] = beta  # of a root mean square of beta; a proxy has none
    values = {key: value for key, value in cfg.items() if key != "name"}
    assert IntrospectiveDistance(S, **values)(first, second[:, :S]).item() == pytest.approx(printed, abs=5e-5)


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
@pytest.mark.parametrize("form", FORMS)
def test_gradients(kind, combination, width, form):
    x, y = rows(3).requires_grad_(), rows(2, width, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(metric(kind, combination=combination, form=form), (x, y))


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("uncertainty", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_the_same_place_and_boundless_uncertainty_have_finite_gradients(combination, uncertainty, form):
    x = rows(4).float()
    x[1, :S] = x[0, :S]
    x[:, S:] *= uncertainty
    x.requires_grad_()
    distance = metric(combination=combination, form=form)(x)
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


@pytest.mark.parametrize("near", [1e-2, 1e-3, 1e-5])
def test_near_images_keep_their_gradient_where_the_network_is_sure_enough(near):
    # The gradient of alpha exp(-beta / alpha) to alpha is exp(-beta / alpha) (1 + beta / alpha).
    x = torch.zeros(1, S + U, dtype=torch.float64)
    y = torch.zeros(1, S, dtype=torch.float64)
    x[0, 0], y[0, :2] = 1, torch.tensor([math.cos(near), math.sin(near)], dtype=torch.float64)
    x[0, S:] = near
    x.requires_grad_()
    metric(tau=1.0)(x, y).sum().backward()
    assert x.grad[0, 1].abs().item() == pytest.approx(2 * math.exp(-1), rel=1e-3)
    assert x.grad[0, S:].norm().item() == pytest.approx(math.exp(-1) / math.sqrt(U), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [IntrospectiveDistance, IntrospectiveSimilarity])
def test_half_precision_is_measured_in_single_with_finite_gradients(kind, form, combination, dtype):
    x = rows(6).to(dtype)
    x[1] = x[0]  # two images at one place
    x.requires_grad_()
    values = metric(kind, combination=combination, form=form, tau=1.0)(x)
    values.sum().backward()
    assert values.dtype == torch.float32 and values.isfinite().all() and x.grad.isfinite().all()
    exact = metric(kind, combination=combination, form=form, tau=1.0)(x.detach().double())
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=1e-3)  # 2 - 2 cos of one place is 1e-7, not 0


LOSSES_OF_A_SIMILARITY = {
    "Circle": lambda distance: losses.CircleLoss(distance=distance),
    "TupletMargin": lambda distance: losses.TupletMarginLoss(distance=distance),
    "ArcFace": lambda distance: losses.ArcFaceLoss(4, S, distance=distance),
    "CosFace": lambda distance: losses.CosFaceLoss(4, S, distance=distance),
}


@pytest.mark.parametrize("build", LOSSES_OF_A_SIMILARITY.values(), ids=LOSSES_OF_A_SIMILARITY)
def test_losses_that_insist_on_a_cosine_take_the_similarity(build):
    x, labels = rows(8).float().requires_grad_(), torch.arange(4).repeat(2)
    build(metric(IntrospectiveSimilarity, tau=1.0))(x, labels).backward()
    assert x.grad.isfinite().all() and (x.grad[:, S:].abs().sum() > 0)


def test_a_loss_that_is_a_distance_itself_takes_none():
    # pytorch-metric-learning says so by itself, before anything is computed.
    with pytest.raises(AssertionError, match="SignalToNoiseRatioContrastiveLoss requires the distance metric to be"):
        losses.SignalToNoiseRatioContrastiveLoss(distance=metric())


@pytest.mark.parametrize(
    "values", [{"form": "cubed"}, {"scaling": "log"}, {"combination": "mean"}, {"tau": 0.0}, {"offset": -1.0}]
)
def test_values_that_mean_nothing_are_refused(values):
    arguments = {"form": "printed", "tau": 1.0, "offset": 0.0, "scaling": "rms", "combination": "sum", **values}
    with pytest.raises(UserError, match=f"metric.{next(iter(values))}="):
        IntrospectiveDistance(S, **arguments)
