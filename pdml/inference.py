"""A class and an uncertainty for every pixel of a scene, streamed so that memory does not grow with it.

Two read-outs of the per-pixel distributions that ``PatchModel.encode`` gives: *centre*, that of a pixel in
its own patch, and *fused*, the precision-weighted fusion of those that all K covering patches give it,

    w_k = exp(-log_variance_k),   mean = sum_k w_k mean_k / sum_k w_k,   variance = K / sum_k w_k.

Patches are run in raster order. The sums of the fusion live in a window of rows that rolls down the scene: a
row is decided, and its sums forgotten, once no later patch can reach it. Tests compare it with the
naive form in ``tools/reference.py``.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from scipy.ndimage import maximum_filter

from pdml.distributions import fuse
from pdml.patches import PatchSource
from shared.errors import UserError

# On a CPU 32 to 128 patches at a time are equally fast, and the activations of 128 exceed a Pavia-sized cube.
BATCH_SIZE = 64


@dataclass(frozen=True)
class Readout:
    """Maps (H, W) of one read-out; pixels that were not asked for hold -1 and NaN."""

    prediction: np.ndarray  # (H, W) int16, classes from 0
    uncertainty: np.ndarray  # (H, W) float32
    probabilities: np.ndarray | None = None  # (H, W, C) float32 where asked for

    def write(self, rows, columns, log_probabilities: torch.Tensor, uncertainty: torch.Tensor) -> None:
        """Enter the decisions for n pixels: log_probabilities (n, C), uncertainty (n,)."""
        self.prediction[rows, columns] = log_probabilities.argmax(1).cpu().numpy()
        self.uncertainty[rows, columns] = uncertainty.cpu().numpy()
        if self.probabilities is not None:
            self.probabilities[rows, columns] = log_probabilities.exp().cpu().numpy()


@dataclass(frozen=True)
class ScenePrediction:
    """The two read-outs of a scene; ``fused`` is None where not asked for or the model is not dense."""

    centre: Readout
    fused: Readout | None


def predict_scene(
    model,
    cube: np.ndarray,
    batch_size: int = BATCH_SIZE,
    fused: bool = True,
    wanted: np.ndarray | None = None,
    probabilities: bool = False,
    timer: dict | None = None,
    progress: Callable | None = None,
) -> ScenePrediction:
    """Decide the pixels ``wanted`` (H, W) bool, all if None, of a cube (H, W, bands).

    Only the patches that they need are run. ``probabilities`` keeps those of every class. ``timer`` collects
    the seconds of "patches", "network" and "readout". ``progress`` wraps the list of batches, as tqdm does.
    The model keeps its device, its modes and its weights. Raises UserError if a patch does not fit, and
    where the network gives numbers that are not finite.
    """
    source = PatchSource(cube, model.patch_size)
    wanted = np.ones(source.shape, bool) if wanted is None else wanted
    fused = fused and model.dense
    # A fused pixel needs every in-scene centre within the radius, so that K is the same for any ``wanted``.
    needed = maximum_filter(wanted, size=source.patch_size, mode="constant", cval=False) if fused else wanted
    batches = list(raster_batches(needed, batch_size, source.patch_size))
    centre = empty_readout(model, source.shape, probabilities)
    with evaluating(model) as like:
        rolling = None
        if fused:
            rolling = RollingFusion(model, empty_readout(model, source.shape, probabilities), wanted, like)
        for rows, columns in (progress or iter)(batches):
            with seconds(timer, "patches"):
                patches = source.gather(rows, columns).to(like)
            with seconds(timer, "network"):
                mean, log_variance = model.encode(patches) if fused else model.encode_centre(patches)
                if not (mean.isfinite().all() and log_variance.isfinite().all()):
                    raise UserError("the outputs of the network are not finite: the training diverged, lower optim.lr")
            with seconds(timer, "readout"):
                if fused:
                    rolling.add(rows, columns, mean, log_variance)
                    mean, log_variance = (x[..., source.radius, source.radius] for x in (mean, log_variance))
                asked = np.flatnonzero(wanted[rows, columns])
                if len(asked):
                    keep = torch.from_numpy(asked).to(like.device)
                    pixels = rows[asked], columns[asked]
                    write_decisions(model, centre, *pixels, mean[keep], log_variance[keep].exp())
        with seconds(timer, "readout"):
            return ScenePrediction(centre, rolling.finish() if fused else None)


class RollingFusion:
    """Sums of w * mean and w in a window of 2 p - 1 rows, from which finished rows are decided.

    The window holds every row that a batch spanning at most p rows of centres can reach. It goes over the
    border by the radius, so that mirrored positions need no mask: they are added there and never read.
    """

    def __init__(self, model, readout: Readout, wanted: np.ndarray, like: torch.Tensor):
        size = model.patch_size
        self.model, self.readout, self.wanted = model, readout, wanted
        self.size, self.radius = size, size // 2
        self.top = -self.radius  # scene row that the window begins with
        self.sums = like.new_zeros(2, wanted.shape[1] + 2 * self.radius, model.width, 2 * size - 1)
        covering = [np.minimum(np.arange(n), self.radius) for n in wanted.shape]
        self.rows_covering, self.columns_covering = (near + near[::-1] + 1 for near in covering)

    def add(self, rows: np.ndarray, columns: np.ndarray, mean: torch.Tensor, log_variance: torch.Tensor):
        """Add the distributions (n, D, p, p) of patches centred at rows, columns (n,), in raster order."""
        self.roll_to(rows[0] - self.radius)
        weight = torch.exp(-log_variance)
        # Neighbouring centres of one row are added together, one offset at a time: no target is hit twice in
        # one addition, so that the order of the sums, and with it the result, is fixed on every device.
        breaks = (np.diff(columns) != 1) | (np.diff(rows) != 0)
        borders = [0, *np.flatnonzero(breaks) + 1, len(rows)]
        for sums, terms in zip(self.sums, (weight * mean, weight), strict=True):
            for begin, end in pairwise(borders):
                first, left = rows[begin] - self.radius - self.top, columns[begin]
                window = sums[..., first : first + self.size]
                for offset in range(self.size):
                    window[left + offset : left + offset + end - begin] += terms[begin:end, ..., offset]

    def roll_to(self, top: int) -> None:
        """Decide the rows above scene row ``top``, which no later patch reaches, and move the window."""
        height = self.sums.shape[-1]
        for row in range(max(self.top, 0), min(top, self.top + height, len(self.wanted))):
            self._decide(row)
        moved = min(top - self.top, height)
        if moved > 0:
            self.sums[..., : height - moved] = self.sums[..., moved:].clone()
            self.sums[..., height - moved :] = 0
            self.top = top

    def finish(self) -> Readout:
        """Decide the rows that are still in the window and return the read-out."""
        self.roll_to(len(self.wanted))
        return self.readout

    def _decide(self, row: int) -> None:
        columns = np.flatnonzero(self.wanted[row])
        if not len(columns):
            return
        inside = torch.from_numpy(columns + self.radius).to(self.sums.device)
        weighted, weight = self.sums[:, inside, :, row - self.top]  # (n, D) each
        count = self.rows_covering[row] * self.columns_covering[columns]
        count = torch.from_numpy(count).to(weight)[:, None]
        write_decisions(self.model, self.readout, row, columns, *fuse(weighted, weight, count))


def write_decisions(model, readout: Readout, rows, columns, mean: torch.Tensor, variance: torch.Tensor):
    """Decide n pixels from their distributions, mean and variance (n, D), into a read-out."""
    readout.write(rows, columns, model.decide(mean, variance), model.uncertainty(mean, variance))


def raster_batches(needed: np.ndarray, size: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pixels of a mask (H, W) in raster order: at most ``size`` at a time, from ``rows`` rows."""
    flat, width = np.flatnonzero(needed), needed.shape[1]
    start = 0
    while start < len(flat):
        below = (flat[start] // width + rows) * width
        stop = min(start + size, np.searchsorted(flat, below))
        yield np.divmod(flat[start:stop], width)
        start = stop


def empty_readout(model, shape: tuple[int, int], probabilities: bool = False) -> Readout:
    """Return maps (H, W) to be filled, with those of the class probabilities (H, W, C) where asked for."""
    table = np.full((*shape, model.num_classes), np.nan, np.float32) if probabilities else None
    return Readout(np.full(shape, -1, np.int16), np.full(shape, np.nan, np.float32), table)


def predict_scene_convolutional(model, cube: np.ndarray, probabilities: bool = False, tile_rows: int = 128) -> Readout:
    """Decide every pixel of a cube (H, W, bands) at the centre, with work shared between patches.

    ``model.encode_scene`` maps an image (1, bands, H, W) to mean and log-variance (1, D, H, W). It sees
    neighbouring pixels where a patch is padded inside the network, and its result differs by that padding.
    Tiles of rows overlap by all that a pixel looks at: the result does not depend on them.
    """
    height, width, _ = cube.shape
    overlap = model.patch_size // 2 + model.backbone.reach
    readout = empty_readout(model, (height, width), probabilities)
    with evaluating(model) as like:
        for top in range(0, height, tile_rows):
            rows = np.arange(top, min(top + tile_rows, height))
            start = max(top - overlap, 0)
            tile = torch.from_numpy(cube[start : rows[-1] + 1 + overlap].astype(np.float32))
            encoded = model.encode_scene(tile.permute(2, 0, 1)[None].to(like))
            for row in rows:  # a decision may need D values for every pixel and class
                mean, log_variance = (x[0, :, row - start].T for x in encoded)
                write_decisions(model, readout, row, np.arange(width), mean, log_variance.exp())
    return readout


@contextlib.contextmanager
def evaluating(model):
    """Yield an empty tensor of the model's device and dtype, the model in evaluation mode, no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    weights = [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    model.eval()
    try:
        with torch.inference_mode():
            yield weights[0].new_empty(0)
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def seconds(timer: dict | None, name: str):
    """Add the seconds that the block took to ``timer[name]``."""
    begin = time.perf_counter()
    yield
    if timer is not None:
        timer[name] = timer.get(name, 0.0) + time.perf_counter() - begin
