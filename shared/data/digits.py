"""The digits inside scikit-learn (UCI "Optical Recognition of Handwritten Digits", test part): the demos' data."""

from collections.abc import Iterable

import numpy as np
import sklearn.datasets

from shared.data.keyed import keyed_places


def load_digits(classes: Iterable[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 8, 8) float32 in [0, 1] and labels (n,) int64, of some classes or of all ten (n = 1797).

    Labels keep their numbers. Raises ValueError for a class that is not one of 0 to 9.
    """
    chosen = sorted(set(range(10) if classes is None else classes))
    if not chosen or not set(chosen) <= set(range(10)):
        raise ValueError(f"digits has the classes 0 to 9, asked for {chosen}")
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    kept = np.isin(labels, chosen)
    return (images[kept] / 16).astype(np.float32).reshape(-1, 8, 8), labels[kept].astype(np.int64)


def split_by_index(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted train and test indices, int64: ``fraction`` of every class (rounded) to train.

    The draw is keyed by (seed, index), the same on every machine. Every class keeps at least one image on
    each side. Raises ValueError for a fraction outside (0, 1) or a class with one image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction must lie between 0 and 1, got {fraction}")
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    for name in names[sizes < 2]:
        raise ValueError(f"class {name} has one image and cannot be split")
    counts = np.clip(np.rint(fraction * sizes), 1, sizes - 1)
    in_train = keyed_places(labels, seed) < counts[inverse]
    return np.flatnonzero(in_train), np.flatnonzero(~in_train)
