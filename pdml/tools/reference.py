"""The naive form of scene inference: every patch first, then the network over all of them.

It needs p * p times the memory of the cube (6.9 GB for 610 x 340 x 103 and p = 9) and whole-scene sums for
the fusion. The tests compare ``inference.predict_scene`` with it, and ``pdml.tools.bench`` times the two.
"""

from itertools import product

import numpy as np
import torch

from pdml.inference import BATCH_SIZE, ScenePrediction, empty_readout, evaluating, seconds, write_decisions
from pdml.patches import PatchSource


def predict_scene(
    model, cube: np.ndarray, batch_size: int = BATCH_SIZE, probabilities: bool = False, timer: dict | None = None
) -> ScenePrediction:
    """Decide every pixel of a cube (H, W, bands), with the read-outs and the timer of ``inference.predict_scene``."""
    source = PatchSource(cube, model.patch_size)
    (height, width), size, radius = source.shape, source.patch_size, source.radius
    rows, columns = np.divmod(np.arange(height * width), width)
    with seconds(timer, "patches"):
        patches = np.empty((height * width, size, size, source.bands), np.float32)
        for row in range(height):  # in pieces, so that the index arrays do not add to the 6.9 GB
            line = slice(row * width, (row + 1) * width)
            patches[line] = source.gather(rows[line], columns[line]).permute(0, 2, 3, 1).numpy()
    centre, readout = empty_readout(model, source.shape, probabilities), None
    with evaluating(model) as like:
        padded = (height + 2 * radius, width + 2 * radius)
        sums, count = like.new_zeros(2, *padded, model.width), like.new_zeros(padded)
        for begin in range(0, len(patches), batch_size):
            batch = slice(begin, begin + batch_size)
            with seconds(timer, "network"):
                inputs = torch.from_numpy(patches[batch]).permute(0, 3, 1, 2).to(like)
                mean, log_variance = model.encode(inputs) if model.dense else model.encode_centre(inputs)
            with seconds(timer, "readout"):
                if model.dense:
                    weight = torch.exp(-log_variance)
                    weighted = weight * mean
                    for i, j in product(range(size), range(size)):
                        y, x = rows[batch] + i, columns[batch] + j
                        sums[0, y, x] += weighted[..., i, j]
                        sums[1, y, x] += weight[..., i, j]
                        count[y, x] += 1
                    mean, log_variance = mean[..., radius, radius], log_variance[..., radius, radius]
                write_decisions(model, centre, rows[batch], columns[batch], mean, log_variance.exp())
        if model.dense:
            with seconds(timer, "readout"):
                readout = empty_readout(model, source.shape, probabilities)
                for row in range(height):
                    weighted, weight = sums[:, row + radius, radius : radius + width]
                    covering = count[row + radius, radius : radius + width, None]
                    line = np.full(width, row), np.arange(width)
                    write_decisions(model, readout, *line, weighted / weight, covering / weight)
    return ScenePrediction(centre, readout)
