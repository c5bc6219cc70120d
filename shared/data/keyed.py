"""Random numbers as a function of a key, the same on every machine and with every library version.

A draw is named by integers such as (seed, epoch, index). Hashing that name, rather than advancing a generator, makes
it independent of workers, ranks, resumption and of the order in which anything else was drawn. The mixing function is
the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from pathlib import Path

import numpy as np
import yaml

STREAMS: dict[str, int] = yaml.safe_load(Path(__file__).with_name("streams.yml").read_text(encoding="utf-8"))
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream(name: str) -> int:
    """Return the number of a named stream, the first part of a key; KeyError for one that streams.yml lacks."""
    return STREAMS[name]


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def keyed_bits(*key) -> np.ndarray:
    """Return 64 random bits for a key: integers, or integer arrays that broadcast, one result per element.

    ``keyed_bits(seed, epoch, np.arange(n))`` is an array (n,) of uint64. Negative integers are refused.
    """
    parts = [np.asarray(part) for part in key]
    if any(part.dtype.kind not in "iu" or (part.size and part.min() < 0) for part in parts):
        raise ValueError("a key is made of integers, none of them negative")
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        for part in parts:
            state = _mix((state ^ part.astype(np.uint64)) * GOLDEN + GOLDEN)
    return state


def keyed_uniform(*key) -> np.ndarray:
    """Return float64 uniform on [0, 1) for a key as in ``keyed_bits``."""
    return (keyed_bits(*key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(length: int, *key: int) -> np.ndarray:
    """Return a permutation of range(length), int64, as a function of the key."""
    return np.argsort(keyed_bits(*key, np.arange(length)), kind="stable")


def keyed_places(labels: np.ndarray, *key: int) -> np.ndarray:
    """Return the place (n,) int64 of every element in a permutation of those of its label, by the key and its index."""
    labels, bits = np.asarray(labels), keyed_bits(*key, np.arange(len(labels)))
    places = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        places[members[np.argsort(bits[members], kind="stable")]] = np.arange(len(members))
    return places
