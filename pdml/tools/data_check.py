"""What `make data-check` compares of scenes beside checksums: every variable's shape, type and pixels of a class."""

from pathlib import Path

import numpy as np

from pdml.matlab import read_mat
from shared.data.manifest import DataFile, Manifest, locate, recorded


def check_variables(manifest: Manifest, entry: DataFile, root: Path) -> str | None:
    """Return a phrase for every variable, None for a file whose manifest names none.

    Raises UserError where checksum, shape, type or counts differ from the manifest.
    """
    if not entry.keys:
        return None
    path, phrases = root / entry.path, []
    if entry.sha256 is not None or entry.path in recorded(manifest, root):
        locate(manifest, root, entry.path)
    for key, variable in entry.keys.items():
        data = read_mat(path, key)
        if data.shape != variable.shape or variable.dtype not in (None, str(data.dtype)):
            expected = f"get the file that has {variable.shape} {variable.dtype or 'of any type'}"
            raise manifest.wrong(f"{path}: {key} is {data.shape} {data.dtype}", expected)
        phrase = f"{key} {' x '.join(map(str, data.shape))}"
        if key in manifest.counts:
            values, numbers = np.unique(data[data != 0], return_counts=True)
            counts = dict(zip(values.tolist(), numbers.tolist(), strict=True))
            expected = dict(enumerate(manifest.counts[key], 1))
            if counts != expected:
                raise manifest.wrong(f"{path}: {key} counts {counts}", f"get the file that has {expected}")
            phrase += f", {len(counts)} classes, {numbers.sum()} labelled"
        phrases.append(phrase)
    locate(manifest, root, entry.path)  # only now is a checksum recorded that was not known
    return "; ".join(phrases)
