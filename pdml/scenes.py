"""From a `data` config to a scene and its split: a user's cube, the synthetic scene or the resampled one.

The label maps, cubes and abundances come from files under the data root (pdml/files.py), checked against the
manifest that the config names. What is wrong with a file is said in one sentence (UserError).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdml.config import DataConfig
from pdml.files import read_array, read_map
from pdml.resample import pixel_sides, resample_scene
from pdml.splits import Split, make_split
from pdml.synthetic import synthetic_scene
from shared.errors import UserError

__all__ = ["Scene", "Split", "load_scene"]


@dataclass(frozen=True)
class Scene:
    """A hyperspectral scene with its labels; the cube keeps the file's own integer type, or is float32."""

    name: str
    cube: np.ndarray  # (H, W, bands), C-contiguous
    labels: np.ndarray  # (H, W) int16: 0 = unlabelled, classes 1..C
    class_names: list[str]
    colours: list[str]  # hex, one per class
    abundances: np.ndarray | None = None  # (H, W, materials) float32, the true ones where they are known


def _pixels_first(values: np.ndarray, cfg: DataConfig, path: Path) -> np.ndarray:
    """Return (H, W, channels) of an array in the config's layout; UserError where its shape does not fit."""
    height, width = cfg.height, cfg.width
    if cfg.layout == "bands_by_pixels_column_major":
        if values.ndim != 2 or values.shape[1] != height * width:
            raise UserError(
                f"{path}: the array is {values.shape}, not channels x {height * width} pixels; "
                "fix data.height and data.width, or get the right file"
            )
        return values.reshape(-1, width, height).transpose(2, 1, 0)
    if cfg.layout != "hwb":
        raise UserError(f"{path}: data.layout {cfg.layout!r} is unknown; set hwb or bands_by_pixels_column_major")
    if values.ndim != 3:
        raise UserError(
            f"{path}: the array is {values.shape}, not height x width x bands; set data.cube_key or "
            "data.layout to what the file holds"
        )
    return values


def _finite(values: np.ndarray, path: Path) -> np.ndarray:
    """Return the values, float32 unless integer; UserError names the first band with NaN or infinity."""
    if values.dtype.kind in "iu":
        return np.ascontiguousarray(values)
    values = np.ascontiguousarray(values, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(values.reshape(-1, values.shape[-1])).all(0))
    if len(bad):
        raise UserError(
            f"{path}: band {bad[0]} (counted from 0) holds NaN or infinite values, {len(bad)} such bands "
            "in all; list them in data.drop_bands (and lower data.bands), or fix the cube"
        )
    return values


def _cube(cfg: DataConfig, data_root) -> tuple[np.ndarray, Path]:
    values, path = read_array(cfg, data_root, cfg.cube_file, cfg.cube_key)
    cube = _pixels_first(values, cfg, path)
    dropped = sorted(set(cfg.drop_bands))
    if cube.shape[2] != cfg.bands + len(dropped) or (dropped and not 0 <= dropped[0] <= dropped[-1] < cube.shape[2]):
        raise UserError(
            f"{path}: the cube has {cube.shape[2]} bands, but the config keeps {cfg.bands} and drops "
            f"{len(dropped)}; fix data.bands and data.drop_bands, or get the right file"
        )
    return _finite(np.delete(cube, dropped, axis=2) if dropped else cube, path), path


def _labels(cfg: DataConfig, data_root, abundances):
    """Return labels (H, W) int16, the official pair of maps or None, and the file of the labels."""
    if cfg.labels_from == "largest_abundance":
        if abundances is None:
            raise UserError(f"{cfg.name}: labels_from largest_abundance needs data.abundances_file; name it")
        return (abundances.argmax(2) + 1).astype(np.int16), None, Path(cfg.abundances_file)
    maps, path = None, None
    if cfg.train_labels_key or cfg.train_labels_file:
        pairs = (cfg.train_labels_file, cfg.train_labels_key), (cfg.test_labels_file, cfg.test_labels_key)
        (first, path), (second, other) = (read_map(cfg, data_root, *pair) for pair in pairs)
        if first.shape != second.shape:
            raise UserError(
                f"{path} and {other}: the training map is {first.shape}, the test map {second.shape}; "
                "get the pair of maps that belongs together"
            )
        maps = first.astype(np.int16), second.astype(np.int16)
    if cfg.labels_from == "union":
        if maps is None:
            raise UserError(f"{cfg.name}: labels_from union needs data.train_labels_file and its test map; name them")
        labels = np.where(maps[0] > 0, *maps)
    elif cfg.labels_from == "map":
        labels, path = read_map(cfg, data_root, cfg.labels_file, cfg.labels_key)
    else:
        raise UserError(f"unknown data.labels_from {cfg.labels_from!r}; set map, union or largest_abundance")
    return labels.astype(np.int16), maps, path


def _published(cfg: DataConfig, data_root, labels: np.ndarray, source) -> tuple[np.ndarray, tuple]:
    """Return the labels and the maps (train, test), each (H, W) int16, of a split given by its training map alone.

    What the training map marks trains, under that map's own label in the numbering of the config; all other pixels
    that ``labels`` (H, W) names are scored. Raises UserError for a map that is not given or does not fit.
    """
    if not cfg.split.map_file:
        raise UserError(f"{cfg.name}: data.split.kind published needs the training map; name it in data.split.map_file")
    marked, path = read_map(cfg, data_root, cfg.split.map_file, cfg.split.map_key)
    if marked.shape != labels.shape:
        raise UserError(
            f"{path} and {source}: the training map is {marked.shape}, the labels are {labels.shape}; get the pair of "
            "files that belongs together"
        )
    numbering = np.array([0, *cfg.split.map_classes], np.int16)
    if marked.max() >= len(numbering):
        raise UserError(
            f"{path}: the training map has a class {int(marked.max())}, data.split.map_classes names "
            f"{len(numbering) - 1}; get the right map, or fix data.split.map_classes"
        )
    train = numbering[marked.astype(np.int64)]
    return np.where(train > 0, train, labels), (train, np.where(train > 0, 0, labels))


def _check_labels(labels: np.ndarray, cfg: DataConfig, source) -> None:
    present = np.unique(labels[labels != 0]).tolist()
    classes = len(cfg.class_names)
    if present != list(range(1, classes + 1)):
        raise UserError(
            f"{source}: the labels are {present}, but the config names {classes} classes; get the right "
            "label map, or fix data.class_names"
        )
    if len(cfg.colours) != classes:
        raise UserError(f"{cfg.name}: {len(cfg.colours)} colours for {classes} classes; fix data.colours")


def load_scene(cfg: DataConfig, seed: int, patch_size: int, data_root: str | None) -> tuple[Scene, Split]:
    """Return the scene of a `data` config and its split for a seed; ``patch_size`` widens the disjoint guard.

    The cube of a resampled scene depends on the seed, since it is made after the split; other cubes do not.
    Raises UserError for missing, damaged or unfitting files and for splits that cannot be made.
    """
    cube, abundances, path = None, None, None
    if cfg.kind == "synthetic":
        cube, abundances = synthetic_scene(cfg.height, cfg.width, cfg.bands, len(cfg.class_names), cfg.synthetic)
        labels, maps, source = (abundances.argmax(2) + 1).astype(np.int16), None, cfg.name
    else:
        if cfg.abundances_file:
            values, path = read_array(cfg, data_root, cfg.abundances_file, cfg.abundances_key)
            abundances = _finite(_pixels_first(values, cfg, path), path)
        if cfg.kind == "matlab":
            cube, path = _cube(cfg, data_root)
        labels, maps, source = _labels(cfg, data_root, abundances)
    if cube is not None and cube.shape[:2] != labels.shape:
        raise UserError(
            f"{path} and {source}: the cube has {' x '.join(map(str, cube.shape[:2]))} pixels, the labels "
            f"{' x '.join(map(str, labels.shape))}; get the pair of files that belongs together"
        )
    if labels.shape != (cfg.height, cfg.width):
        raise UserError(
            f"{source}: the labels are {labels.shape}, the config says {(cfg.height, cfg.width)}; fix "
            "data.height and data.width, or get the right file"
        )
    if cfg.split.kind == "published":
        labels, maps = _published(cfg, data_root, labels, source)
    _check_labels(labels, cfg, source)
    split = make_split(labels, len(cfg.class_names), cfg.split, seed, patch_size, str(source), maps)
    if cfg.kind == "resampled":
        spectra, path = read_array(cfg, data_root, cfg.cube_file, cfg.cube_key)
        own, _ = read_array(cfg, data_root, cfg.resample.labels_file, cfg.resample.labels_key)
        if spectra.shape != (own.size, cfg.bands):
            raise UserError(
                f"{path}: the spectra are {spectra.shape}, not {own.size} labels x {cfg.bands} bands; "
                "get the pair of files that belongs together, or fix data.bands"
            )
        side = pixel_sides(labels, split, cfg.resample.sides, patch_size)
        cube, abundances, _ = resample_scene(
            labels, side, _finite(spectra, path), own, cfg.resample.sigma, cfg.resample.noise, seed
        )
    elif cfg.kind not in ("matlab", "synthetic"):
        raise UserError(f"{cfg.name}: unknown data.kind {cfg.kind!r}; set matlab, synthetic or resampled")
    return Scene(cfg.name, cube, labels, list(cfg.class_names), list(cfg.colours), abundances), split
