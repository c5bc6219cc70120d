"""Arrays from MATLAB files: v5 to v7 through ``scipy.io``, v7.3 (an HDF5 file) through ``h5py``.

Hyperspectral scenes are handed round in both. The version is read from the file's own signature. HDF5 keeps
MATLAB's column-major array with its axes reversed; here both versions come back as MATLAB displays them.
Format: https://www.mathworks.com/help/matlab/import_export/mat-file-versions.html
"""

from pathlib import Path

import h5py
import numpy as np
import scipy.io

from shared.errors import UserError

NUMERIC = "biuf"  # numpy kinds; complex numbers do not occur in the scenes and are refused
# The class that v7.3 notes beside the numbers: text is stored as uint16.
NOT_NUMBERS = (b"char", b"cell", b"struct", b"function_handle")


def _is_hdf5(path: Path) -> bool:
    """Return whether a file is v7.3, False when it is v5; UserError when it is neither."""
    with path.open("rb") as stream:
        header = stream.read(128)
    if header.startswith(b"MATLAB 7.3") or h5py.is_hdf5(path):
        return True
    # The last four bytes of a v5 header: version 0x0100 and the letters MI, both in the writer's byte order.
    if header[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
        return False
    raise UserError(f"{path} is no MATLAB v5 or v7.3 file: download it again, or save it with MATLAB's -v7.3")


def _wrong_key(path: Path, key: str, present: list[str]) -> UserError:
    there = ", ".join(sorted(present)) or "nothing"
    return UserError(f"{path} holds no variable {key!r}: choose one of those that are there ({there})")


def _not_numeric(path: Path, key: str) -> UserError:
    return UserError(f"{path}: variable {key!r} is not an array of real numbers: choose another variable")


def _read_hdf5(path: Path, key: str) -> np.ndarray:
    with h5py.File(path, "r") as file:
        present = [name for name in file if not name.startswith("#")]  # '#refs#' is MATLAB's own
        if key not in present:
            raise _wrong_key(path, key, present)
        data = file[key]
        if (
            not isinstance(data, h5py.Dataset)
            or data.dtype.kind not in NUMERIC
            or data.attrs.get("MATLAB_class") in NOT_NUMBERS
        ):
            raise _not_numeric(path, key)
        if data.attrs.get("MATLAB_empty"):  # then the stored numbers are the dimensions
            return np.zeros(tuple(int(size) for size in data[()]))
        return data[()].T


def _read_v5(path: Path, key: str) -> np.ndarray:
    variables = scipy.io.loadmat(path, variable_names=[key])
    if key not in variables or key.startswith("__"):
        raise _wrong_key(path, key, [name for name, _, _ in scipy.io.whosmat(path)])
    data = variables[key]
    if not isinstance(data, np.ndarray) or data.dtype.kind not in NUMERIC:
        raise _not_numeric(path, key)
    return data


def _guarded(path: Path, read, *arguments):
    if not path.is_file():
        raise UserError(f"{path} is missing: put the file there")
    try:
        return read(path, *arguments)
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
    data = _guarded(path, lambda file: (_read_hdf5 if _is_hdf5(file) else _read_v5)(file, key))
    return np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("="))


def require_readable(path: str | Path) -> None:
    """Raise UserError when a MATLAB file is missing, foreign or cut short; whatever its variables are."""

    def read(file: Path) -> None:
        # Opening an HDF5 file compares its length with the stored one; a v5 file must be read to the end.
        if _is_hdf5(file):
            h5py.File(file, "r").close()
        else:
            scipy.io.loadmat(file)

    _guarded(Path(path), read)
