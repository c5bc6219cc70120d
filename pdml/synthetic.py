"""A synthetic scene by linear mixing with known abundances, for runs without any data file.

y(x) = sum over materials of blurred(a_m(x) (s_m(x) e_m + v_m(x))) + noise, with smooth abundance fields a,
smooth endmember spectra e, and within-class variability: a scale s and a smooth additive spectrum v that vary
from pixel to pixel (the linear mixing model with spectral variability; Zare and Ho, IEEE Signal Processing
Magazine 2014). All numbers are ours, in the config.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from pdml.config import SyntheticConfig
from pdml.normal import keyed_normal
from shared.data.keyed import keyed_uniform, stream

FIELDS, BUMPS, COMMON, SCALE, SHAPE, NOISE = (
    stream(f"pdml.synthetic.{name}") for name in ("fields", "bumps", "common", "scale", "shape", "noise")
)


def abundance_fields(height: int, width: int, materials: int, synthetic: SyntheticConfig) -> np.ndarray:
    """Return (H, W, materials) float64, fractions that sum to 1: softmax of smooth fields / ``temperature``."""
    index = np.ix_(np.arange(height), np.arange(width), np.arange(materials))
    fields = keyed_normal(FIELDS, synthetic.seed, *index)
    fields = gaussian_filter(fields, (synthetic.smoothness, synthetic.smoothness, 0), mode="reflect")
    fields = (fields - fields.mean((0, 1))) / fields.std((0, 1))
    fields = np.exp((fields - fields.max(2, keepdims=True)) / synthetic.temperature)
    return fields / fields.sum(2, keepdims=True)


def _bumps(tag: int, seed: int, rows: int, number: int, bands: int) -> np.ndarray:
    """Return (rows, bands): rows of ``number`` Gaussian bumps each, with keyed place, width and height."""
    row, bump = np.ix_(np.arange(rows), np.arange(number))
    place, width, height = (keyed_uniform(tag, seed, row, bump, part)[..., None] for part in range(3))
    x = np.linspace(0, 1, bands)
    return (height * np.exp(-0.5 * ((x - place) / (0.04 + 0.16 * width)) ** 2)).sum(1)


def endmembers(materials: int, bands: int, synthetic: SyntheticConfig) -> np.ndarray:
    """Return (materials, bands) float64 reflectance: a common smooth shape plus ``contrast`` x an own one."""
    common = _bumps(COMMON, synthetic.seed, 1, 6, bands)
    own = _bumps(BUMPS, synthetic.seed, materials, 4, bands)
    return 0.2 + 0.2 * common + synthetic.contrast * own


def synthetic_scene(
    height: int, width: int, bands: int, materials: int, synthetic: SyntheticConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cube (H, W, bands) float32 and the true abundances (H, W, materials) float32.

    ``synthetic`` has seed, smoothness (pixels), temperature, contrast, scale and shape (standard deviations
    of the variability, relative and in reflectance), psf (standard deviation, pixels), noise (reflectance).
    The abundances are blurred by the same point-spread function as the cube: they are what a pixel holds.
    """
    seed = synthetic.seed
    abundances = abundance_fields(height, width, materials, synthetic)
    spectra = endmembers(materials, bands, synthetic)
    row, column, part = np.ix_(np.arange(height), np.arange(width), np.arange(3))
    x = np.linspace(0, 1, bands)
    shapes = np.stack([x - 0.5, np.cos(2 * np.pi * x), np.sin(3 * np.pi * x)])  # (3, bands)
    cube = np.zeros((height, width, bands))
    for material in range(materials):
        scale = 1 + synthetic.scale * keyed_normal(SCALE, seed, material, row[..., 0], column[..., 0])
        added = synthetic.shape * keyed_normal(SHAPE, seed, material, row, column, part) @ shapes
        cube += abundances[..., material, None] * (scale[..., None] * spectra[material] + added)
    spread = (synthetic.psf, synthetic.psf, 0)
    cube = gaussian_filter(cube, spread, mode="reflect")
    abundances = gaussian_filter(abundances, spread, mode="reflect")
    band = np.arange(bands)[None, None]
    cube += synthetic.noise * keyed_normal(NOISE, seed, row[:, :, :1], column[:, :, :1], band)
    return cube.astype(np.float32), abundances.astype(np.float32)
