"""Intervals and paired tests over seeds hold what they promise, also for one seed and for equal values."""

import math
import warnings

import numpy as np
import pytest

from shared.metrics.seeds import Estimate, holm, interval, paired

ROUNDED = 1e-3  # the textbook prints three digits
EXACT = 1e-12
T_975_4 = 2.7764451052  # Student t, 97.5 %, 4 degrees of freedom, from a printed table


def test_interval_is_students_t():
    values = [0.9, 0.92, 0.91, 0.95, 0.88]
    result = interval(values)
    half = T_975_4 * np.std(values, ddof=1) / math.sqrt(5)
    assert result.mean == pytest.approx(np.mean(values), abs=EXACT)
    assert result.std == pytest.approx(np.std(values, ddof=1), abs=EXACT)
    assert (result.low, result.high) == pytest.approx((result.mean - half, result.mean + half), abs=1e-9)
    assert result.n == 5


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = [(over_seeds := interval(rng.normal(2, 3, 4))).low < 2 < over_seeds.high for _ in range(600)]
    assert 0.92 < np.mean(hits) < 0.98  # 95 % with the noise of 600 draws (3 standard errors)


def test_one_seed_has_no_interval():
    assert (interval([0.5]).low, interval([0.5]).high, interval([0.5]).std) == (None, None, None)
    assert paired({0: 1.0}, {0: 0.5, 1: 2.0}) == Estimate(0.5, 1)
    assert paired({0: 1.0}, {1: 0.5}) == Estimate(None, 0)
    with pytest.raises(ValueError):
        interval([])


def test_paired_uses_the_seeds_that_both_have():
    # the sleep data of Student (1908), as every textbook prints it: t = -4.0621, df 9, p = 0.002833
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    a, b = dict(enumerate(first)) | {77: 100.0}, dict(enumerate(second)) | {99: -100.0}
    result = paired(a, b)
    assert result.n == 10
    assert result.mean == pytest.approx(-1.58, abs=EXACT)
    assert (result.low, result.high) == pytest.approx((-2.4599, -0.7001), abs=ROUNDED)
    assert result.p_value == pytest.approx(0.002833, abs=ROUNDED)


@pytest.mark.parametrize(("gap", "p"), [(0.0, 1.0), (0.1, 0.0)])
def test_identical_differences_raise_no_warning(gap, p):
    values = {0: 0.1, 1: 0.2, 2: 0.7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired({seed: value + gap for seed, value in values.items()}, values)
        equal = interval([0.3, 0.3, 0.3])
    assert (result.mean, result.low, result.high) == pytest.approx((gap, gap, gap), abs=EXACT)
    assert result.p_value == p
    assert (equal.low, equal.high, equal.std) == (0.3, 0.3, 0.0)


def test_holm_steps_down_and_stops_at_the_first_that_fails():
    # level / 4 = 0.0125, level / 3 = 0.0167, level / 2 = 0.025: the third fails, so the fourth is not looked at
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}, 4) == {"a", "d"}
    # of six that are planned, level / 6 = 0.0083 and level / 5 = 0.01
    assert holm({"a": 0.011, "d": 0.005}, 6) == {"d"} and holm({"a": 0.01, "d": 0.005}, 6) == {"a", "d"}
    assert holm({}, 3) == set()


def test_holm_seldom_finds_anything_where_nothing_is():
    rng = np.random.default_rng(0)
    false = sum(bool(holm(dict(enumerate(rng.uniform(size=29))), 29)) for _ in range(2000))
    assert 0.03 < false / 2000 < 0.07  # 5 % of the families, not 1 - 0.95^29 = 77 %
