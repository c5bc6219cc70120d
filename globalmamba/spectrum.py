"""Matrices of the frequency serialization: the cosine transform, the bands and the shrinking, as float64 arrays.

Everything here is a constant of image size, patch size and number of levels K, computed once with NumPy.
The paper (arXiv 2410.10316) gives the transform; it defines neither f(u, v) nor the thresholds f_k, so the
bands are those of the authors' release (https://github.com/wangck20/GlobalMamba).
"""

import numpy as np


def dct_matrix(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II, (size, size): ``D @ x`` is the spectrum of a column, ``D.T`` its inverse."""
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.cos(np.pi * frequency * (2 * position + 1) / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def bilinear_matrix(target: int, source: int) -> np.ndarray:
    """Return bilinear interpolation along one axis, (target, source): corners not aligned, no antialiasing."""
    place = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0)
    below = np.minimum(np.floor(place).astype(np.int64), source - 1)
    above = np.minimum(below + 1, source - 1)
    matrix, rows = np.zeros((target, source)), np.arange(target)
    np.add.at(matrix, (rows, below), 1 - (place - below))
    np.add.at(matrix, (rows, above), place - below)
    return matrix


def area_matrix(target: int, source: int) -> np.ndarray:
    """Return the mean over each target pixel's area along one axis, (target, source): shrinking without aliasing."""
    edges = np.arange(target + 1) * source / target
    begin, end = edges[:-1, None], edges[1:, None]
    places = np.arange(source)[None, :]
    return np.clip(np.minimum(end, places + 1) - np.maximum(begin, places), 0, None) * target / source


def shrink_matrix(target_grid: int, grid: int, patch_size: int, variant: str, shrinking=bilinear_matrix) -> np.ndarray:
    """Return what shrinks one axis of an image to ``target_grid`` patches, (target_grid p, grid p).

    ``as_written`` interpolates pixels. ``as_released`` interpolates the tokens, after the convolution; the
    convolution is linear, so this is the same interpolation between pixels at equal places of their patches.
    ``shrinking``: bilinear_matrix or area_matrix.
    """
    if variant == "as_written":
        return shrinking(target_grid * patch_size, grid * patch_size)
    return np.kron(shrinking(target_grid, grid), np.eye(patch_size))


def nearest_patches(target_grid: int, grid: int, patch_size: int) -> np.ndarray:
    """Return the pixels, along one axis, of the patches under the centres of the cells of a smaller grid.

    Shape (target_grid p,), int64.
    """
    patches = (2 * np.arange(target_grid) + 1) * grid // (2 * target_grid)
    return (patches[:, None] * patch_size + np.arange(patch_size)).reshape(-1)


def band_masks(height: int, width: int, levels: int, bands: str) -> list[np.ndarray]:
    """Return which coefficients (u, v) each level keeps: K arrays (H, W) of bool, from low to high frequency.

    Level k < K keeps u / h + v / w < 1 with h = H // 2^(K-1-k), w = W // 2^(K-1-k): on a square image these
    are the release's triangles, u + v <= 55, 111, 223 at 224 pixels and K = 4. Level K keeps everything.
    ``disjoint`` takes from every level what the level below it has.
    """
    u, v = np.arange(height)[:, None], np.arange(width)[None, :]
    masks = []
    for level in range(1, levels):
        h, w = height >> (levels - 1 - level), width >> (levels - 1 - level)
        masks.append(u * w + v * h < h * w)
    masks.append(np.ones((height, width), bool))
    if bands == "disjoint":
        return [masks[0]] + [high & ~low for low, high in zip(masks, masks[1:], strict=False)]
    return masks
