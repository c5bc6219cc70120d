"""What a data set consists of, where it comes from, and whether the files at hand are those files.

One ``manifests/<name>.yml`` per data set. A sha256 that is not known there is never invented: it is recorded
on first use in ``<data root>/.sha256/<name>.json`` and compared ever after.
"""

import functools
import hashlib
import json
import logging
from pathlib import Path, PurePosixPath
from typing import Literal

import h5py
import scipy.io
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from shared.errors import UserError
from shared.files import write_text

LOGGER = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "manifests"


class Variable(BaseModel, extra="forbid", frozen=True):
    """A variable of a MATLAB file: its shape as MATLAB displays it, its numpy type where known."""

    shape: tuple[int, ...]
    dtype: str | None = None


class _Entry(BaseModel, extra="forbid", frozen=True):
    path: str  # relative to the data root
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")  # required: None is said, where it is not known

    @field_validator("path")
    @classmethod
    def _inside_the_root(cls, path: str) -> str:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError("a path is relative to the data root and stays inside it")
        return path


class DataFile(_Entry):
    """A file of a data set; ``sha256: null`` means not known, so recorded on first use."""

    keys: dict[str, Variable] = {}
    note: str = ""

    def is_in(self, root: Path) -> bool:
        return (root / self.path).is_file()


class ImageFolder(_Entry):
    """A split of images, too many to be named one by one: a folder per class, or a file that gives the classes.

    The sha256 is that of the listing (``folders.py``); where it is not known, numbers alone are compared.
    """

    split: Literal["train", "test"]
    classes: int | None  # None: a folder of images without classes
    images: int  # in all
    per_class: int | list[int] | None  # in the order of the classes' names; None: not compared
    labels_file: str | None = None  # relative to `path`; lines: file name, tab, class, further columns
    size: int | None = None  # every image has size x size pixels; such a set is decoded once

    @model_validator(mode="after")
    def _sets_decoded_once_have_a_checksum(self):
        if self.size is not None and self.sha256 is None:
            raise ValueError("images with a size are kept under their sha256, which must be given")
        return self

    def is_in(self, root: Path) -> bool:
        return (root / self.path).is_dir()


class Manifest(BaseModel, extra="forbid", frozen=True):
    """A data set; ``counts`` gives, for each variable that holds labels, the pixels or images of each class.

    In a label map 0 means unlabelled and is not counted. A name in ``counts`` that is no variable of a file
    describes labels that are derived; the manifest's comment says how.
    """

    name: str
    title: str
    source: str
    terms: str
    files: list[DataFile]
    folders: list[ImageFolder] = []
    counts: dict[str, list[int]] = {}
    root_marker: str | None = None  # a folder that every data root of this kind has

    def wrong(self, what: str, remedy: str = "get the data again") -> UserError:
        """Return the error that says what is wrong with the data and where they come from."""
        return UserError(f"{what}: {remedy}, source: {self.source}")


def manifest_names() -> list[str]:
    """Return the names of all manifests, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yml"))


def load_manifest(name: str) -> Manifest:
    """Return the manifest ``manifests/<name>.yml``; UserError for an unknown name, key or a wrong type."""
    if name not in manifest_names():
        raise UserError(f"There is no manifest {name!r}: choose one of {', '.join(manifest_names())}")
    path = FOLDER / f"{name}.yml"
    try:
        manifest = Manifest.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a valid manifest, fix it: {' '.join(str(error).split())}") from error
    if manifest.name != name:
        raise UserError(f"{path} calls itself {manifest.name!r}: give the file and its 'name' the same name")
    return manifest


def manifest_sha256(manifest: Manifest) -> str:
    """Return the sha256 of the manifest's canonical JSON, for a run's config hash.

    Only what can change a number goes in: another wording of a note or of the terms must not make evidence stale.
    """
    # No key for folders where there are none: the older manifests keep their hash.
    kept = {"name", "files", "counts"} | ({"folders"} if manifest.folders else set())
    content = manifest.model_dump(mode="json", include=kept, exclude={"files": {"__all__": {"note"}}})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once a process; size and time are part of the key, so that a new file is hashed again."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record_path(manifest: Manifest, data_root: Path) -> Path:
    return data_root / ".sha256" / f"{manifest.name}.json"


def recorded(manifest: Manifest, data_root: Path) -> dict[str, str]:
    """Return the checksums that were recorded in a data root, by file; UserError for a damaged record."""
    record = _record_path(manifest, data_root)
    if not record.exists():
        return {}
    try:
        return {**json.loads(record.read_text(encoding="utf-8"))}  # a TypeError where it is no table
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{record} cannot be read ({error}): delete it, and it is written again") from error


def _record(manifest: Manifest, data_root: Path, file: str, digest: str) -> None:
    """Add a checksum atomically; a data root that cannot be written is no reason to stop."""
    record = _record_path(manifest, data_root)
    content = {**recorded(manifest, data_root), file: digest}
    try:
        write_text(record, json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        LOGGER.warning("the sha256 of %s (%s) could not be recorded in %s: %s", file, digest, record, error)


def checked_root(data_root: str | Path | None, remedy: str) -> Path:
    """Return the data root; UserError, which ends in the remedy, where it is not set or no folder."""
    if not data_root:  # an empty string is an environment variable that is not set, not this folder
        raise UserError(f"The data root is not set: {remedy}")
    if not Path(data_root).is_dir():
        raise UserError(f"The data root {data_root} is not a folder: {remedy}")
    return Path(data_root)


def require_there(manifest: Manifest, data_root: str | Path | None, entry: DataFile | ImageFolder) -> Path:
    """Return the path of a file or folder of a manifest; UserError where it or the data root is missing."""
    remedy = f"set DATA_ROOT=<folder>, put {entry.path} there, source: {manifest.source}"
    root = checked_root(data_root, remedy)
    if not entry.is_in(root):
        marker = manifest.root_marker
        strange = marker and not (root / marker).exists()
        doubt = f" (which has no {marker}: is it the right folder?)" if strange else ""
        raise UserError(f"{entry.path} is missing in DATA_ROOT={root}{doubt}: {remedy}")
    return root / entry.path


def _require_readable(path: Path) -> None:
    """Raise UserError for a damaged MATLAB file; recorded, half a download would have the whole one refused."""
    try:
        if h5py.is_hdf5(path):  # v7.3; opening compares its length with the stored one
            h5py.File(path, "r").close()
        else:
            scipy.io.loadmat(path)
    except Exception as error:  # both readers raise almost anything on damaged bytes
        raise UserError(f"{path} is truncated or unreadable ({error}): download it again") from error


def locate(manifest: Manifest, data_root: str | Path | None, file: str) -> Path:
    """Return the path of a file, named as in its manifest, after checking its sha256.

    Raises UserError when the data root or the file is missing, when the file has another checksum than the
    manifest or the record says, and when a MATLAB file that would be recorded for the first time is damaged.
    """
    entries = {entry.path: entry for entry in manifest.files}
    if file not in entries:
        known = ", ".join(entries) or "none, it is embedded"
        raise UserError(f"The manifest {manifest.name} names no file {file!r}: choose another ({known})")
    path, root = require_there(manifest, data_root, entries[file]), Path(data_root)
    published = entries[file].sha256
    expected = published or recorded(manifest, root).get(file)
    if expected is None and path.suffix == ".mat":
        _require_readable(path)
    stat = path.stat()
    digest = _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)
    if expected is None:
        _record(manifest, root, file, digest)
    elif digest != expected:
        choice = f"if it was changed on purpose, delete its line in {_record_path(manifest, root)}; else "
        wrong = f"{path} has the wrong checksum: expected sha256 {expected}, found {digest}"
        raise manifest.wrong(wrong, f"{'' if published else choice}get the file again")
    return path
