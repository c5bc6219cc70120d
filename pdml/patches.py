"""Patches of a scene: what the network sees of a pixel, gathered from the cube when it is needed.

A patch is the p x p neighbourhood of its centre pixel with all bands, p odd. It reaches over the border of
the scene by mirroring without repeating the edge (``np.pad`` mode "reflect"), done with index arrays, so
that no padded copy of the cube is ever made.
"""

import numpy as np
import torch

from shared.data.keyed import keyed_bits
from shared.errors import UserError


class PatchSource:
    """Cuts patches out of a cube (H, W, bands) of any real dtype; UserError if the patch does not fit."""

    def __init__(self, cube: np.ndarray, patch_size: int):
        height, width, bands = cube.shape
        if patch_size < 1 or patch_size % 2 == 0:
            raise UserError(f"the patch size is {patch_size}: set an odd one, which has a centre pixel")
        radius = patch_size // 2
        if min(height, width) <= radius:
            raise UserError(
                f"a scene of {height} x {width} pixels is too small for {patch_size} x {patch_size} patches: "
                f"set a patch size of at most {2 * min(height, width) - 1}"
            )
        self.shape, self.bands, self.patch_size, self.radius = (height, width), bands, patch_size, radius
        self.pixels = cube.reshape(height * width, bands)
        self._row_of = np.pad(np.arange(height), radius, mode="reflect")
        self._column_of = np.pad(np.arange(width), radius, mode="reflect")

    def positions(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the flat scene index (n, p, p) of each pixel of the patches at rows, columns (n,)."""
        window = np.arange(self.patch_size)
        rows = self._row_of[np.asarray(rows)[:, None] + window]
        columns = self._column_of[np.asarray(columns)[:, None] + window]
        return rows[:, :, None] * self.shape[1] + columns[:, None, :]

    def gather(self, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        """Return the patches (n, bands, p, p) float32 centred at rows, columns (n,), channels last in memory.

        Bands stay innermost, as they are in the cube: a spectrum is one block to copy, and the projection
        onto principal components inside the model reads it so.
        """
        spectra = np.take(self.pixels, self.positions(rows, columns), axis=0)  # (n, p, p, bands)
        return torch.from_numpy(spectra.astype(np.float32, copy=False)).permute(0, 3, 1, 2)

    def gather_map(self, values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        """Return the patches (n, p, p) of a map (H, W), such as the labels, mirrored likewise."""
        return torch.from_numpy(np.take(values, self.positions(rows, columns)))


def augment(patches: torch.Tensor, labels: torch.Tensor | None, keys: tuple):
    """Turn or flip each patch (n, bands, p, p), and its labels (n, p, p), by one of the square's symmetries.

    The symmetry of a patch is a function of ``keys``, the arguments of ``keyed_bits``, for example
    ``(seed, epoch, indices)`` with indices (n,). Returns the new patches and labels (None if None was given).
    """
    count, bands, size, _ = patches.shape
    symmetry = (keyed_bits(*keys) % np.uint64(8)).astype(np.int64)
    if symmetry.shape != (count,):
        raise ValueError(f"keys give draws of shape {symmetry.shape} for {count} patches")
    index = np.arange(count)[:, None] * size**2 + symmetries(size)[symmetry]  # (n, p * p)
    index = torch.from_numpy(index.reshape(-1)).to(patches.device)
    spectra = patches.permute(0, 2, 3, 1).reshape(-1, bands)
    turned = spectra.index_select(0, index).reshape(count, size, size, bands).permute(0, 3, 1, 2)
    if labels is not None:
        labels = labels.reshape(-1).index_select(0, index.to(labels.device)).reshape(count, size, size)
    return turned, labels


def symmetries(size: int) -> np.ndarray:
    """Return where each pixel of a turned patch comes from: (8, size * size) int64, the identity first."""
    square = np.arange(size * size).reshape(size, size)
    turned = [np.rot90(face, quarter) for face in (square, square.T) for quarter in range(4)]
    return np.stack(turned).reshape(8, -1)
