"""Arrays from MATLAB files: v5 to v7 through ``scipy.io``, v7.3 (an HDF5 file) through ``h5py``.

The version is read from the file's signature. HDF5 keeps MATLAB's column-major array with its axes reversed; here both
come back as MATLAB displays them. Format: https://www.mathworks.com/help/matlab/import_export/mat-file-versions.html
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import scipy.io

from shared.errors import UserError

NUMERIC = "biuf"  # numpy kinds; complex numbers do not occur in the scenes and are refused
# The class that v7.3 notes beside the numbers: text is stored as uint16.
NOT_NUMBERS = (b"char", b"cell", b"struct", b"function_handle")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[bool]:
    """Tell whether a file is v7.3, False when it is v5; UserError when it is neither, missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: put the file there")
    try:
        with path.open("rb") as stream:
            header = stream.read(128)
        is_hdf5 = header.startswith(b"MATLAB 7.3") or h5py.is_hdf5(path)
        # The last four bytes of a v5 header: version 0x0100 and the letters MI, both in the writer's byte order.
        if not is_hdf5 and header[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            remedy = "download it again, or save it with MATLAB's -v7.3"
            raise UserError(f"{path} is no MATLAB v5 or v7.3 file: {remedy}")
        yield is_hdf5
    except UserError:
        raise
    except Exception as error:  # both readers raise almost anything (even TypeError) on damaged bytes
        raise UserError(f"{path} is truncated or unreadable ({error}): download it again") from error


def read_mat(path: str | Path, key: str) -> np.ndarray:
    """Return the numeric variable ``key`` of a MATLAB file, axes as MATLAB displays them, C-contiguous.

    The numbers keep their type, in the byte order of this machine. Raises UserError for a missing, truncated
    or foreign file, for a key that is not there (it lists those that are), for text, cells and structs.
    """
    path = Path(path)
    with _readable(path) as is_hdf5:
        names, data = (_read_hdf5 if is_hdf5 else _read_v5)(path, key)
        if key not in names:
            there = ", ".join(sorted(names)) or "nothing"
            raise UserError(f"{path} holds no variable {key!r}: choose one of those that are there ({there})")
        if not isinstance(data, np.ndarray) or data.dtype.kind not in NUMERIC:
            wrong = f"variable {key!r} is not an array of real numbers"
            raise UserError(f"{path}: {wrong}: choose another variable")
    return np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("="))


def _read_hdf5(path: Path, key: str) -> tuple[list[str], np.ndarray | None]:
    """Return the names of a file's variables and an array, None where there is none of that name."""
    with h5py.File(path, "r") as file:
        names = [name for name in file if not name.startswith("#")]  # '#refs#' is MATLAB's own
        data = file[key] if key in names else None
        if not isinstance(data, h5py.Dataset) or data.attrs.get("MATLAB_class") in NOT_NUMBERS:
            return names, None
        if data.attrs.get("MATLAB_empty"):  # then the stored numbers are the dimensions
            return names, np.zeros(data[()].astype(int))
        return names, data[()].T


def _read_v5(path: Path, key: str) -> tuple[list[str], np.ndarray | None]:
    names = [name for name, _, _ in scipy.io.whosmat(path)]
    return names, scipy.io.loadmat(path, variable_names=[key]).get(key)
