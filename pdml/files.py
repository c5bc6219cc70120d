"""The files of a scene under the data root: MATLAB arrays, TIFF maps and ENVI's lists of regions, checked.

A label map is taken under the name that this project's manifests give it, or under those that its distributors use
(OTHER_NAMES): the University of the Basque Country for Indian Pines, Pavia University, KSC and Salinas, the contest of
the IEEE GRSS for Houston 2013, and the pairs of maps of that scene and of Pavia University that stand beside much
published code. Under another name its checksum is not known; its pixels of each class are compared with the manifest's.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from pdml.config import DataConfig
from pdml.matlab import read_mat
from shared.data.manifest import DataFile, Manifest, load_manifest, locate
from shared.errors import UserError

HOUSTON = "2013_IEEE_GRSS_DF_Contest_Samples"
# By the variable of the manifest: file names, with the variable's name in them.
OTHER_NAMES = {
    "indian_pines_gt": (("Indian_pines_gt.mat", "indian_pines_gt"),),
    "indianpines_disjoint_dset": (("indianpines_disjoint_dset.mat", "indianpines_disjoint_dset"),),
    "paviaU_gt": (("PaviaU_gt.mat", "paviaU_gt"),),
    "TRpavia_fixed": (("TRpavia_fixed.mat", "TRpavia_fixed"), ("TRpaviaU.mat", "TRpaviaU")),
    "TSpavia_fixed": (("TSpavia_fixed.mat", "TSpavia_fixed"), ("TSpaviaU.mat", "TSpaviaU")),
    "KSC_gt": (("KSC_gt.mat", "KSC_gt"),),
    "salinas_gt": (("Salinas_gt.mat", "salinas_gt"),),
    "houston_gt_tr": ((f"{HOUSTON}_TR.txt", None), (f"{HOUSTON}_TR.tif", None), ("TRLabel.mat", "TRLabel")),
    "houston_gt_te": ((f"{HOUSTON}_VA.txt", None), (f"{HOUSTON}_VA.tif", None), ("TSLabel.mat", "TSLabel")),
}


def read_regions(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Return (H, W) uint8 of ENVI's text list of regions: region 1, 2, ... in the file's order, 0 elsewhere.

    Its lines hold a number, X and Y, counted from 1; ``ROI npts`` in the header says how many lines each region has.
    Raises UserError for a file that cannot be read so.
    """
    labels = np.zeros(shape, np.uint8)
    try:
        lines = path.read_text(encoding="latin-1").splitlines()
        sizes = [int(line.split(":")[1]) for line in lines if line.startswith("; ROI npts:")]
        points = [line.split()[1:3] for line in lines if line.strip() and not line.startswith(";")]
        column, row = np.array(points, np.int64).T - 1
        regions = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        if not sizes or min(row.min(), column.min()) < 0:
            raise ValueError("no region, or a pixel before the first")
        labels[row, column] = regions
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no list of regions of {shape} pixels ({error}): export it again") from error
    return labels


def path_of(cfg: DataConfig, data_root, file: str) -> Path:
    """Return the path of a file under the data root, its checksum compared; no manifest, no comparison."""
    if cfg.manifest:
        return locate(load_manifest(cfg.manifest), data_root, file)
    if not data_root:
        raise UserError(f"the data root is not set: set DATA_ROOT=<folder>, the folder in which {file} lies")
    return Path(data_root) / file


def _read(path: Path, key: str | None, shape: tuple[int, int]) -> np.ndarray:
    if path.suffix == ".txt":
        return read_regions(path, shape)
    if path.suffix != ".tif":
        return read_mat(path, key)
    try:
        with Image.open(path) as image:
            return np.array(image)
    except OSError as error:
        raise UserError(f"{path} is missing or no readable TIFF file ({error}): get it again") from error


def read_array(cfg: DataConfig, data_root, file: str, key: str | None) -> tuple[np.ndarray, Path]:
    """Return an array of a file under the data root and its path; UserError for a missing, damaged or other file."""
    path = path_of(cfg, data_root, file)
    return _read(path, key, (cfg.height, cfg.width)), path


def read_map(cfg: DataConfig, data_root, file: str, key: str | None) -> tuple[np.ndarray, Path]:
    """Return a label map and its path: ``file`` or, where it is not there, one of OTHER_NAMES beside it or the cube.

    Raises UserError as ``read_array``, and for a map of another name that has other pixels than the manifest counts.
    """
    folders = dict.fromkeys(str(Path(name).parent) for name in (file, cfg.cube_file or file))
    others = [(f"{folder}/{name}", other) for name, other in OTHER_NAMES.get(key, ()) for folder in folders]
    there = [(name, other) for name, other in others if data_root and (Path(data_root) / name).is_file()]
    if not there or (Path(data_root) / file).is_file():
        return read_array(cfg, data_root, file, key)
    name, other = there[0]
    path = Path(data_root) / name
    values = _read(path, other, (cfg.height, cfg.width))
    if cfg.manifest:
        manifest = load_manifest(cfg.manifest)
        _require_counts(manifest, path, key, values)
        added = manifest.model_copy(update={"files": [*manifest.files, DataFile(path=name, sha256=None)]})
        locate(added, data_root, name)  # records its checksum, now that its content is right
    return values, path


def _require_counts(manifest: Manifest, path: Path, key: str, values: np.ndarray) -> None:
    numbers, counts = np.unique(values[values != 0], return_counts=True)
    expected = dict(enumerate(manifest.counts[key], 1))
    if dict(zip(numbers.tolist(), counts.tolist(), strict=True)) != expected:
        raise manifest.wrong(f"{path} has other pixels of the classes than {key}, which has {expected}")
