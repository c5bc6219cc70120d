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
    name = {"dir": path.parent, "prefix": path.name, "suffix": ".tmp"}
    with tempfile.NamedTemporaryFile(delete=False, **name) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)  # of a temporary file it is 0600, but data are shared between users
            os.replace(stream.name, path)
        except BaseException:
            os.unlink(stream.name)
            raise
