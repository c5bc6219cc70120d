"""Files that are whole or absent at any moment."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for bytes that stands under its name, synced, once the block has ended without an error.

    Folders above it are made. An OSError, or what the block raises, leaves what was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, but data are shared between users
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
