"""Mean, interval and paired test over seeds: scipy's Student t, with the small-sample cases spelled out."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """Mean over seeds, sample standard deviation (ddof 1), interval of the mean; None below n = 2."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """Mean of a - b over common seeds, its confidence interval and two-sided p value; None below n = 2."""

    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n: int


def interval(values, level: float = 0.95) -> Interval:
    """Return the mean of ``values`` (n,) with its Student-t interval; ValueError for no value."""
    values = np.asarray(values, float)
    n = values.size
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, None, None, None, 1)
    if np.ptp(values) == 0:  # scipy divides by the deviation
        return Interval(float(values[0]), 0.0, float(values[0]), float(values[0]), n)
    low, high = stats.t.interval(level, n - 1, loc=mean, scale=stats.sem(values))
    return Interval(mean, float(values.std(ddof=1)), float(low), float(high), n)


def paired(a: dict[int, float], b: dict[int, float], level: float = 0.95) -> Paired:
    """Return the paired t test of ``a`` against ``b`` (seed -> value) over their common seeds.

    Differences that are all equal have the interval [d, d] and p = 0, or p = 1 if they are all zero.
    """
    seeds = sorted(a.keys() & b.keys())
    n = len(seeds)
    if n == 0:
        return Paired(None, None, None, None, 0)
    first, second = np.array([a[seed] for seed in seeds], float), np.array([b[seed] for seed in seeds], float)
    difference = first - second
    mean = float(difference.mean())
    if n == 1:
        return Paired(mean, None, None, None, 1)
    # rounding of a - b counts as no variance: scipy warns about it and its t would be noise
    rounding = 1e-12 * max(np.abs(first).max(), np.abs(second).max())
    if np.ptp(difference) <= rounding:
        mean = 0.0 if abs(mean) <= rounding else mean
        return Paired(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    test = stats.ttest_rel(first, second)
    bounds = test.confidence_interval(level)
    return Paired(mean, float(bounds.low), float(bounds.high), float(test.pvalue), n)


def holm(p_values: dict, level: float = 0.05) -> set:
    """Return the keys whose hypotheses Holm's step-down method rejects: at most ``level`` for one false one among all.

    S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    rejected = set()
    for rank, key in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[key] > level / (len(p_values) - rank):
            break
        rejected.add(key)
    return rejected
