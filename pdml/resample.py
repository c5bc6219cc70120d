"""A scene of resampled real spectra on a real label map, so that no spectrum of one half trains and is scored.

Where a cube may not be had but some labelled spectra may, every pixel is given a mixture of real spectra of
the classes in its blur window. The scene is made after the split: the labelled spectra are halved per class,
and the half that a pixel draws from is that of its own side. Under a disjoint split no patch that takes part
in deciding a scored pixel holds a spectrum of the training half. All numbers are ours, none the paper's.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt, maximum_filter
from scipy.sparse import csr_array

from pdml.normal import keyed_normal
from pdml.splits import Split
from shared.data.keyed import keyed_permutation, keyed_uniform, stream
from shared.errors import UserError

HALVES, DRAWS, NOISE = (stream(f"pdml.resample.{name}") for name in ("halves", "draws", "noise"))
WINDOW = 1  # the blur window reaches one pixel: 3 x 3


def halve(spectra_labels: np.ndarray, seed: int) -> np.ndarray:
    """Return (n,) int8 per spectrum: 0 = training half, 1 = test half, -1 = odd one of its class, unused."""
    half = np.full(len(spectra_labels), -1, np.int8)
    for number in np.unique(spectra_labels):
        members = np.flatnonzero(spectra_labels == number)
        members = members[keyed_permutation(len(members), HALVES, seed, int(number))]
        size = len(members) // 2
        half[members[:size]], half[members[size : 2 * size]] = 0, 1
    return half


def pixel_sides(labels: np.ndarray, split: Split, rule: str, patch_size: int) -> np.ndarray:
    """Return (H, W) int8, the half of the spectra that each pixel draws from: 0 = training, 1 = test.

    Training pixels are on the training side, scored ones on the test side. All others follow ``rule``:

    - ``pixels``: the training side. Patches around scored pixels then hold spectra of the training half, as the
      patches of a random split hold training pixels anyway.
    - ``regions``: the side of their block and, where the split has no blocks, that of the nearest training or
      scored pixel. Of a split with blocks every pixel is on the test side that a patch can hold which takes part
      in deciding a scored pixel; the guard band keeps training pixels out of there.

    Raises UserError for another rule and for ``pixels`` under a split with blocks.
    """
    if rule not in ("pixels", "regions"):
        raise UserError(f"unknown data.resample.sides {rule!r}; set pixels or regions")
    if rule == "pixels" and split.blocks is not None:
        raise UserError(
            "data.resample.sides pixels would put spectra of the training half into scored patches of a disjoint "
            "split; set data.resample.sides to regions"
        )
    if rule == "pixels":
        side = np.zeros(labels.shape, np.int8)
    elif split.blocks is None:
        nearest = distance_transform_edt(~(split.train | split.test), return_distances=False, return_indices=True)
        side = split.test[tuple(nearest)].astype(np.int8)
    else:
        # The patches that cover a scored pixel reach 2 * radius = patch_size - 1 pixels from it.
        reached = maximum_filter(split.test, size=2 * patch_size - 1, mode="constant", cval=0)
        side = np.where(reached, 1, split.blocks).astype(np.int8)
    side[split.test], side[split.train] = 1, 0
    return side


def mixing_weights(labels, side, spectra_labels, half, sigma: float, seed: int) -> csr_array:
    """Return (H * W, n) sparse: the weight of each real spectrum in each pixel, rows summing to 1.

    Each of the 3 x 3 neighbours (Gaussian weights of standard deviation ``sigma`` pixels) adds a random
    convex pair of spectra of its class, from the half of the centre pixel's side. Unlabelled pixels take the
    class of the nearest labelled one.
    """
    nearest = distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    filled = labels[tuple(nearest)]
    height, width = labels.shape
    classes = int(spectra_labels.max())
    members = [[np.flatnonzero((spectra_labels == c) & (half == s)) for c in range(1, classes + 1)] for s in (0, 1)]
    size = np.array([[len(group) for group in row] for row in members])  # (2, C)
    pool = np.zeros((2, classes, size.max()), np.int64)
    for s in (0, 1):
        for c, group in enumerate(members[s]):
            pool[s, c, : len(group)] = group
    reach = np.arange(-WINDOW, WINDOW + 1)
    weight = np.exp(-(reach[:, None] ** 2 + reach[None] ** 2) / (2 * sigma**2)).ravel()
    weight /= weight.sum()
    padded = np.pad(filled, WINDOW, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * WINDOW + 1,) * 2)
    neighbour = windows.reshape(height * width, -1).astype(np.int64) - 1  # (H W, 9) classes from 0
    own = side.reshape(-1, 1).astype(np.int64)
    pixel, place = np.arange(height * width)[:, None], np.arange(len(weight))[None]
    columns, data = [], []
    fraction = keyed_uniform(DRAWS, seed, pixel, place, 2)
    for partner, part in ((0, fraction), (1, 1 - fraction)):
        drawn = keyed_uniform(DRAWS, seed, pixel, place, partner)
        columns.append(pool[own, neighbour, (drawn * size[own, neighbour]).astype(np.int64)])
        data.append(weight * part)
    columns, data = np.concatenate(columns, 1), np.concatenate(data, 1)
    start = np.arange(height * width + 1) * columns.shape[1]
    return csr_array((data.ravel(), columns.ravel(), start), shape=(height * width, len(spectra_labels)))


def resample_scene(labels, side, spectra, spectra_labels, sigma: float, noise: float, seed: int):
    """Return cube (H, W, bands) and abundances (H, W, C), float32, and the mixing weights (H * W, n), sparse.

    labels (H, W); side (H, W) from ``pixel_sides``; spectra (n, bands); spectra_labels (n,) in the numbering of
    labels; ``noise`` is the standard deviation of the added Gaussian noise, in the unit of the spectra.
    """
    spectra_labels = np.asarray(spectra_labels).ravel().astype(np.int64)
    mixing = mixing_weights(labels, side, spectra_labels, halve(spectra_labels, seed), sigma, seed)
    clean = mixing @ np.asarray(spectra, np.float64)  # (H W, bands)
    pixel, band = np.arange(clean.shape[0])[:, None], np.arange(clean.shape[1])[None]
    cube = clean + noise * keyed_normal(NOISE, seed, pixel, band)
    of_class = np.eye(int(spectra_labels.max()))[spectra_labels - 1]  # (n, C)
    shape = labels.shape
    return (
        cube.astype(np.float32).reshape(*shape, -1),
        (mixing @ of_class).astype(np.float32).reshape(*shape, -1),
        mixing,
    )
