"""The five metrics between Gaussians against sampling, other closed forms, and finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from pdml.distributions import LOG_VARIANCE_HIGH, LOG_VARIANCE_LOW, METRICS, GaussianHeads, fuse
from pdml.normal import keyed_normal
from shared.data.keyed import keyed_uniform

# A mean of 100,000 samples has a standard error that is estimated from the samples; 5 of them are passed by
# chance once in a million comparisons, and the samples are keyed, so the outcome is the same everywhere.
SAMPLES, BATCHES, STANDARD_ERRORS = 100_000, 10, 5
# Sorted samples overestimate W2 by about variance x log log n / n a dimension, far below its standard error.
WASSERSTEIN_BIAS = 1e-3
TELLING = 0.15  # 5 standard errors, relative to the spread of the values: more could hide a wrong factor
EXACT = 1e-11  # float64, sums of a few dozen terms of at most a hundred
CONSTANT = 1e-6  # log 2 pi enters mutual_likelihood_score rounded to float32
PAIRS = pytest.mark.parametrize("name", METRICS)
ZERO_AT_SELF = ("wasserstein", "bhattacharyya", "symmetric_kl")


def gaussians(key: int, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means and variances, each (count, width) float64, variances from 0.3 to 2."""
    index = np.ix_(np.arange(count), np.arange(width))
    mean, variance = keyed_normal(key, 0, *index), 0.3 + 1.7 * keyed_uniform(key, 1, *index)
    return torch.from_numpy(mean), torch.from_numpy(variance)


def log_density(z: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return -0.5 * ((z - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum(1)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def sampled(name: str, a, s, b, t) -> tuple[float, float]:
    """Return the metric of one pair, by its definition from samples, and the standard error of that."""
    index = np.ix_(np.arange(SAMPLES), np.arange(len(a)))
    x = a + np.sqrt(s) * keyed_normal(11, 0, *index)
    y = b + np.sqrt(t) * keyed_normal(11, 1, *index)
    if name == "expected_squared_distance":
        return mean_and_error(((x - y) ** 2).sum(1))
    if name == "wasserstein":  # in one dimension the best transport joins equal ranks
        x, y = (np.sort(z.reshape(BATCHES, -1, len(a)), axis=1) for z in (x, y))
        return mean_and_error(((x - y) ** 2).mean(1).sum(1))
    p, q = (lambda z: log_density(z, a, s)), (lambda z: log_density(z, b, t))
    if name == "symmetric_kl":
        return mean_and_error(0.5 * (p(x) - q(x) + q(y) - p(y)))
    # The logarithm of an integral: the error of log m is the error of m over m.
    power, sign = (1.0, 1) if name == "mutual_likelihood" else (0.5, -1)
    mean, error = mean_and_error(np.exp(q(x) if power == 1.0 else power * (q(x) - p(x))))
    return sign * math.log(mean), error / mean


@PAIRS
def test_metric_is_what_sampling_its_definition_gives(name):
    (a, s), (b, t) = gaussians(1, 2, 4), gaussians(2, 2, 4)
    actual = METRICS[name].pairs(a, s, b, t)
    for i in range(2):
        for j in range(2):
            expected, error = sampled(name, a[i].numpy(), s[i].numpy(), b[j].numpy(), t[j].numpy())
            tolerance = STANDARD_ERRORS * error + (WASSERSTEIN_BIAS if name == "wasserstein" else 0)
            assert tolerance < TELLING * actual.std()
            assert float(actual[i, j]) == pytest.approx(expected, abs=tolerance, rel=0)


def test_symmetric_kl_is_the_mean_of_the_divergences_of_torch():
    (a, s), (b, t) = gaussians(3, 4, 5), gaussians(4, 3, 5)
    p, q = Normal(a[:, None], s.sqrt()[:, None]), Normal(b[None], t.sqrt()[None])
    expected = 0.5 * (kl_divergence(p, q) + kl_divergence(q, p)).sum(2)
    torch.testing.assert_close(METRICS["symmetric_kl"].pairs(a, s, b, t), expected, rtol=0, atol=EXACT)


def test_mutual_likelihood_score_is_the_density_of_the_difference_of_means_in_torch():
    (a, s), (b, t) = gaussians(3, 4, 5), gaussians(4, 3, 5)
    expected = Normal(b[None], (s[:, None] + t[None]).sqrt()).log_prob(a[:, None]).sum(2)
    torch.testing.assert_close(METRICS["mutual_likelihood"].pairs(a, s, b, t), expected, rtol=0, atol=CONSTANT)


@pytest.mark.parametrize("name", ["expected_squared_distance", "wasserstein"])
def test_without_variance_it_is_the_squared_euclidean_distance(name):
    (a, _), (b, _) = gaussians(3, 4, 5), gaussians(4, 3, 5)
    actual = METRICS[name].pairs(a, torch.zeros_like(a), b, torch.zeros_like(b))
    torch.testing.assert_close(actual, torch.cdist(a, b).square(), rtol=0, atol=EXACT)


def test_with_equal_variances_bhattacharyya_and_kl_are_multiples_of_the_mahalanobis_distance():
    (a, s), (b, _) = gaussians(3, 4, 5), gaussians(4, 3, 5)
    s, t = s[:1].expand(4, -1), s[:1].expand(3, -1)
    squared = torch.cdist(a / s.sqrt(), b / t.sqrt()).square()
    torch.testing.assert_close(METRICS["bhattacharyya"].pairs(a, s, b, t), squared / 8, rtol=0, atol=EXACT)
    torch.testing.assert_close(METRICS["symmetric_kl"].pairs(a, s, b, t), squared / 2, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ZERO_AT_SELF)
def test_distance_of_a_distribution_from_itself_is_zero_and_from_others_positive(name):
    a, s = gaussians(5, 6, 4)
    values = METRICS[name].pairs(a, s, a, s)
    own = torch.eye(6, dtype=torch.bool)
    assert values[own].abs().max() < EXACT and values[~own].min() > 0.01
    # The same means with other variances are other distributions.
    assert (METRICS[name].pairs(a, s, a, 2 * s).diagonal() > 0.01).all()


@PAIRS
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 5), m=st.integers(1, 5), width=st.integers(1, 7), key=st.integers(0, 1000))
def test_all_pairs_are_returned_each_as_it_is_alone_and_symmetric(name, n, m, width, key):
    pairs = METRICS[name].pairs
    (a, s), (b, t) = gaussians(2 * key + 100, n, width), gaussians(2 * key + 101, m, width)
    values = pairs(a, s, b, t)
    assert values.shape == (n, m) and values.isfinite().all()
    torch.testing.assert_close(values, pairs(b, t, a, s).T, rtol=EXACT, atol=EXACT)
    alone = [[pairs(a[i : i + 1], s[i : i + 1], b[j : j + 1], t[j : j + 1])[0, 0] for j in range(m)] for i in range(n)]
    torch.testing.assert_close(values, torch.tensor(alone, dtype=torch.float64), rtol=EXACT, atol=EXACT)


@PAIRS
def test_gradient_is_that_of_finite_differences_in_float64(name):
    inputs = [x.requires_grad_() for x in (*gaussians(6, 2, 4), *gaussians(7, 3, 4))]
    assert torch.autograd.gradcheck(METRICS[name].pairs, inputs)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4, 1e30])
def test_log_variance_stays_within_its_bounds_whatever_the_features(size):
    torch.manual_seed(0)
    heads = GaussianHeads(6, 5)
    mean, log_variance = heads(size * torch.randn(3, 6, 4, 4))
    assert mean.shape == log_variance.shape == (3, 5, 4, 4) and mean.isfinite().all()
    assert (LOG_VARIANCE_LOW, LOG_VARIANCE_HIGH) == (-6.0, 3.0)
    assert log_variance.min() >= LOG_VARIANCE_LOW and log_variance.max() <= LOG_VARIANCE_HIGH
    if size >= 1e4:
        assert log_variance.min() < -5.9 and log_variance.max() > 2.9


@pytest.mark.parametrize("logit", [-60.0, -15.0, 0.0, 15.0])
def test_log_variance_at_its_bounds_still_has_a_gradient(logit):
    # Beyond +17 a float32 sigmoid is exactly 1 and has none; its step there is 17 units of the head away.
    heads = GaussianHeads(2, 1)
    torch.nn.init.zeros_(heads.log_variance.weight)
    torch.nn.init.constant_(heads.log_variance.bias, logit)
    heads(torch.ones(1, 2, 1, 1))[1].sum().backward()
    assert float(heads.log_variance.bias.grad) > 0 and heads.log_variance.weight.grad.all()


def test_fusion_weighs_means_by_precision_and_averages_precisions():
    mean = torch.tensor([[1.0], [4.0]])
    precision = torch.tensor([[3.0], [1.0]])
    fused, variance = fuse((mean * precision).sum(0)[None], precision.sum(0)[None], torch.tensor([[2.0]]))
    assert (fused.item(), variance.item()) == (1.75, 0.5)
