"""Reads the golden arrays of this folder's ``golden/``: inputs, parameters, outputs and gradients in float64."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def golden(name: str, prefix: str) -> dict[str, Tensor]:
    """Return the arrays of ``golden/<name>.npz`` whose keys begin with ``prefix``, which is taken off."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        keys = [key for key in arrays.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in keys}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return float((got.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))
