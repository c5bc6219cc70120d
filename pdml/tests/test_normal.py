"""Normal numbers by a key: the same ones everywhere, and normal."""

import numpy as np
import pytest
import scipy.stats

from pdml.normal import keyed_normal

# The key is fixed, so the test gives one p-value for ever; a true generator fails 1 key in 1000.
LOWEST_P_VALUE = 1e-3
# log and cos may differ in the last bits between C libraries; the uniforms that they are made of may not.
TOLERANCE = 1e-12


def test_normal_numbers_never_change_between_versions_and_machines():
    assert keyed_normal(1, 2).item() == pytest.approx(-0.6907260977214288, rel=TOLERANCE)


def test_normal_passes_kolmogorov_smirnov():
    assert scipy.stats.kstest(keyed_normal(5, np.arange(20_000)), "norm").pvalue > LOWEST_P_VALUE
