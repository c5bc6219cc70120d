"""What a data set consists of, where it comes from, and whether the files at hand are those files.

One ``manifests/<name>.yml`` per data set. A sha256 that is not known there is never invented: it is recorded
on first use in ``<data root>/.sha256/<name>.json`` and compared ever after.
"""

import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared.data.folders import ImageFolder, check_images
from shared.data.matlab import read_mat, require_readable
from shared.errors import UserError
from shared.files import write_text

LOGGER = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "manifests"
WRONG = ("wrong checksum", "wrong content")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variable(_Strict):
    """A variable of a MATLAB file: its shape as MATLAB displays it, its numpy type where known."""

    shape: tuple[int, ...]
    dtype: str | None = None


class DataFile(_Strict):
    """A file of a data set; ``sha256: null`` means not known, so recorded on first use."""

    path: str  # relative to the data root
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")
    keys: dict[str, Variable] = {}
    note: str = ""

    @field_validator("path")
    @classmethod
    def _inside_the_root(cls, path: str) -> str:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError("a path is relative to the data root and stays inside it")
        return path


class Manifest(_Strict):
    """A data set; ``counts`` gives, for each variable that holds labels, the pixels or images of each class.

    In a label map 0 means unlabelled and is not counted. A name in ``counts`` that is no variable of a file
    describes labels that are derived; the manifest's comment says how.
    """

    name: str
    title: str
    source: str
    terms: str
    files: list[DataFile]
    folders: list[ImageFolder] = []  # of images, too many to be named one by one
    counts: dict[str, list[int]] = {}
    root_marker: str | None = None  # a folder that every data root of this kind has


@dataclass(frozen=True)
class Row:
    """One line of ``make data-check``; status: embedded, present, recorded, counted, missing, or one of WRONG."""

    manifest: str
    file: str
    status: str
    detail: str


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

    Only what can change a number goes in (name, files, checksums, variables, counts): rewording
    a note or of the terms must not make measured evidence stale. The data root is no part of a manifest.
    """
    content = manifest.model_dump(mode="json", include={"name", "files", "counts"})
    for file in content["files"]:
        del file["note"]
    if manifest.folders:  # no key of its own where there are none: the older manifests keep their hash
        content["folders"] = [folder.model_dump(mode="json") for folder in manifest.folders]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once a process; size and time are part of the key, so that a new file is hashed again."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record_path(manifest: Manifest, data_root: Path) -> Path:
    return data_root / ".sha256" / f"{manifest.name}.json"


def _recorded(record: Path) -> dict[str, str]:
    if not record.exists():
        return {}
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{record} cannot be read ({error}): delete it, and it is written again") from error
    if not isinstance(content, dict):
        raise UserError(f"{record} holds no table of checksums: delete it, and it is written again")
    return content


def _record(record: Path, file: str, digest: str) -> None:
    """Add a checksum atomically; a data root that cannot be written is no reason to stop."""
    try:
        content = {**_recorded(record), file: digest}
        write_text(record, json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        LOGGER.warning("the sha256 of %s (%s) could not be recorded in %s: %s", file, digest, record, error)


def _entry(manifest: Manifest, file: str) -> DataFile:
    for entry in manifest.files:
        if entry.path == file:
            return entry
    known = ", ".join(entry.path for entry in manifest.files) or "none, it is embedded"
    raise UserError(f"The manifest {manifest.name} names no file {file!r}: choose one of its files ({known})")


def _checked_root(data_root: str | Path | None, wanted: str) -> Path:
    if not data_root:  # an empty string is an environment variable that is not set, not this folder
        raise UserError(f"The data root is not set: set DATA_ROOT=<folder>, {wanted}")
    if not Path(data_root).is_dir():
        raise UserError(f"The data root {data_root} is not a folder: set DATA_ROOT=<folder>, {wanted}")
    return Path(data_root)


def locate(manifest: Manifest, data_root: str | Path | None, file: str) -> Path:
    """Return the path of a file, named as in its manifest, after checking its sha256.

    Raises UserError when the data root or the file is missing, when the file has another checksum than the
    manifest or the record says, and when a MATLAB file that would be recorded for the first time is damaged.
    """
    entry = _entry(manifest, file)
    wanted = f"put {file} there, source: {manifest.source}"
    root = _checked_root(data_root, wanted)
    path = root / file
    if not path.is_file():
        marker = manifest.root_marker
        strange = marker and not (root / marker).exists()
        doubt = f" (which has no {marker}: is it the right folder?)" if strange else ""
        raise UserError(f"{file} is missing in DATA_ROOT={root}{doubt}: set DATA_ROOT=<folder>, {wanted}")
    record = _record_path(manifest, root)
    expected = entry.sha256 or _recorded(record).get(file)
    if expected is None and path.suffix == ".mat":
        require_readable(path)  # else half a download would be recorded, and the whole one refused ever after
    stat = path.stat()
    digest = _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)
    if expected is None:
        _record(record, file, digest)
    elif digest != expected:
        remedy = f"get the file again, source: {manifest.source}"
        if entry.sha256 is None:
            remedy += f"; or, if it was changed on purpose, delete its line in {record}"
        raise UserError(
            f"{path} has the wrong checksum: expected sha256 {expected}, found {digest}; {remedy}"
        )
    return path


def _check_content(manifest: Manifest, entry: DataFile, path: Path) -> list[str]:
    """Return one phrase per variable; UserError where shape, type or counts differ from the manifest."""
    phrases = []
    for key, variable in entry.keys.items():
        data = read_mat(path, key)
        if data.shape != variable.shape or variable.dtype not in (None, str(data.dtype)):
            expected = f"{variable.shape} {variable.dtype or 'of any type'}, source: {manifest.source}"
            raise UserError(f"{path}: {key} is {data.shape} {data.dtype}; get the file that has {expected}")
        phrase = f"{key} {' x '.join(map(str, data.shape))}"
        if key in manifest.counts:
            values, numbers = np.unique(data[data != 0], return_counts=True)
            classes = list(range(1, len(manifest.counts[key]) + 1))
            if values.tolist() != classes or numbers.tolist() != manifest.counts[key]:
                present = dict(zip(values.tolist(), numbers.tolist(), strict=True))
                expected = dict(zip(classes, manifest.counts[key], strict=True))
                raise UserError(f"{path}: {key} counts {present}; get the file that has {expected}")
            phrase += f", {len(classes)} classes, {numbers.sum()} labelled"
        phrases.append(phrase)
    return phrases


def _check_file(manifest: Manifest, data_root: Path, entry: DataFile) -> Row:
    path = data_root / entry.path
    status = "missing"
    detail = f"{entry.note} Source: {manifest.source}".strip()
    if path.is_file():
        try:
            status = "wrong checksum"
            if entry.sha256 is not None or entry.path in _recorded(_record_path(manifest, data_root)):
                locate(manifest, data_root, entry.path)
            status = "wrong content"  # looked at before a new checksum is recorded
            detail = "; ".join(_check_content(manifest, entry, path))
            locate(manifest, data_root, entry.path)
            status = "present" if entry.sha256 else "recorded"
        except UserError as error:
            detail = str(error)
    return Row(manifest.name, entry.path, status, detail)


def _check_folder(manifest: Manifest, data_root: Path, entry: ImageFolder) -> Row:
    if not (data_root / entry.path).is_dir():
        return Row(manifest.name, entry.path, "missing", f"Source: {manifest.source}")
    try:
        detail = check_images(entry, data_root, manifest.source)
        return Row(manifest.name, entry.path, "present" if entry.sha256 else "counted", detail)
    except UserError as error:
        return Row(manifest.name, entry.path, "wrong content", str(error))


def check_all(data_root: str | Path | None) -> list[Row]:
    """Return a row for every file and folder of every manifest: checksum, shapes of MATLAB files, counts."""
    root = _checked_root(data_root, "whose sub-folder hsi holds the hyperspectral scenes")
    rows = []
    for manifest in map(load_manifest, manifest_names()):
        if not manifest.files and not manifest.folders:
            rows.append(Row(manifest.name, "-", "embedded", manifest.source))
        rows += [_check_file(manifest, root, entry) for entry in manifest.files]
        rows += [_check_folder(manifest, root, entry) for entry in manifest.folders]
    return rows
