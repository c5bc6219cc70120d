"""The transforms of mmdet and mmseg draw from Python's and numpy's global generators: here, as a function of a key."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from shared.data.keyed import keyed_bits


@contextmanager
def keyed_draws(*key: int) -> Iterator[None]:
    """Seed the global generators of this process, torch's on the CPU too, by a key; put them back in the end."""
    bits = int(keyed_bits(*key))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    torch.default_generator.manual_seed(bits >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
