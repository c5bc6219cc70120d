"""Standard normal numbers as a function of a key, for the noise of made-up scenes."""

import numpy as np

from shared.data.keyed import keyed_uniform


def keyed_normal(*key) -> np.ndarray:
    """Return float64 standard normal numbers for a key as in ``keyed_bits`` (Box and Muller)."""
    radius = np.sqrt(-2.0 * np.log1p(-keyed_uniform(*key, 0)))
    return radius * np.cos(2.0 * np.pi * keyed_uniform(*key, 1))
