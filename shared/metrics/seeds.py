"""Mean, interval and paired test over seeds: scipy's Student t, with the small-sample cases spelled out."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds with its sample standard deviation (ddof 1) and confidence interval, None below n = 2.

    Of a paired difference ``p_value`` is that of the two-sided t test against 0; a mean over no seed is None.
    """

    mean: float | None
    n: int
    std: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def interval(values, level: float = 0.95) -> Estimate:
    """Return the mean of ``values`` (n,) with its Student-t interval; ValueError for no value."""
    values = np.asarray(values, float)
    n = values.size
    if n == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(values.mean())
    if n == 1:
        return Estimate(mean, 1)
    if np.ptp(values) == 0:  # scipy divides by the deviation
        return Estimate(float(values[0]), n, 0.0, float(values[0]), float(values[0]))
    low, high = stats.t.interval(level, n - 1, loc=mean, scale=stats.sem(values))
    return Estimate(mean, n, float(values.std(ddof=1)), float(low), float(high))


def paired(a: dict[int, float], b: dict[int, float], level: float = 0.95) -> Estimate:
    """Return the mean of a - b (seed -> value) over their common seeds with its interval and paired t test.

    Differences that are all equal have the interval [d, d] and p = 0, or p = 1 if they are all zero.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return Estimate(None, 0)
    first, second = np.array([a[seed] for seed in seeds], float), np.array([b[seed] for seed in seeds], float)
    difference = first - second
    # Rounding of a - b counts as no variance, nor as a difference: scipy warns about it and its t would be noise.
    rounding = 1e-12 * max(np.abs(first).max(), np.abs(second).max())
    if np.ptp(difference) > rounding:
        return replace(interval(difference, level), p_value=float(stats.ttest_1samp(difference, 0.0).pvalue))
    mean = float(difference.mean())
    estimate = interval(np.full(len(seeds), 0.0 if abs(mean) <= rounding else mean), level)
    return replace(estimate, p_value=None if len(seeds) == 1 else float(estimate.mean == 0))


def holm(p_values: dict, planned: int, level: float = 0.05) -> set:
    """Return the keys whose hypotheses Holm's step-down method rejects: at most ``level`` for one false one among all.

    ``planned``: how many there are, those without a p value yet included. S. Holm, Scand. J. Statistics 6, 1979.
    """
    rejected = set()
    for rank, key in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[key] > level / (planned - rank):
            break
        rejected.add(key)
    return rejected
