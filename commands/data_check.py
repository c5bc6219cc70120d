"""`make data-check`: which data are there under DATA_ROOT, and are they those of the manifests.

A paper's own check says more of a file in which a manifest names variables (``shared/claims/protocol.py``). Exit code 0
when nothing that is there is wrong (missing is only said), 2 for a wrong file or a bad root.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from shared.claims.protocol import Paper
from shared.data.folders import list_images, require_checksum
from shared.data.manifest import DataFile, ImageFolder, Manifest, checked_root, load_manifest, locate, manifest_names
from shared.errors import UserError


class Row(NamedTuple):
    """One line of the table; status: embedded, present, recorded, counted, missing or wrong."""

    manifest: str
    file: str
    status: str
    detail: str


def _check_file(manifest: Manifest, entry: DataFile, root: Path, papers: Sequence[Paper]) -> str:
    """Return what a paper that reads it says of a file, if any does; UserError where that, or a checksum, is wrong."""
    for check in filter(None, (paper.check_variables for paper in papers)):
        phrase = check(manifest, entry, root)
        if phrase is not None:
            return phrase
    locate(manifest, root, entry.path)
    return ""


def _check_folder(manifest: Manifest, entry: ImageFolder, root: Path) -> str:
    """Return a phrase with the numbers; UserError where they, or a byte where a sha256 is known, differ."""
    listing = list_images(manifest, entry, root)
    phrase = f"{len(listing.classes)} classes, {len(listing.labels)} images"
    if entry.sha256 is None:
        return f"{phrase}, no checksum known"
    images = map(listing.path, range(len(listing.labels)))
    digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in images)
    require_checksum(manifest, entry, listing, digests)
    return phrase


def _row(manifest: Manifest, entry: DataFile | ImageFolder, root: Path, papers: Sequence[Paper]) -> Row:
    is_file = isinstance(entry, DataFile)
    status, detail = "missing", f"{entry.note if is_file else ''} Source: {manifest.source}".strip()
    if entry.is_in(root):
        try:
            check = _check_file(manifest, entry, root, papers) if is_file else _check_folder(manifest, entry, root)
            status, detail = "present" if entry.sha256 else "recorded" if is_file else "counted", check
        except UserError as error:
            status, detail = "wrong", str(error)
    return Row(manifest.name, entry.path, status, detail)


def check_all(data_root: str | Path | None, papers: Sequence[Paper] = ()) -> list[Row]:
    """Return a row for every file and folder of every manifest: checksums, numbers, and what the papers check."""
    root, rows = checked_root(data_root, "set DATA_ROOT=<folder>, the folder that holds the data sets"), []
    for manifest in map(load_manifest, manifest_names()):
        entries = [_row(manifest, entry, root, papers) for entry in [*manifest.files, *manifest.folders]]
        rows += entries or [Row(manifest.name, "-", "embedded", manifest.source)]
    return rows


def table_of(rows: list[Row]) -> Table:
    """Return the table of ``check_all`` for the terminal."""
    table = Table("data set", "file", "status", "detail")
    for name, file, status, detail in rows:
        colour = {"wrong": "red", "missing": "yellow"}.get(status, "green")
        table.add_row(name, Text(file, overflow="fold"), Text(status, colour), Text(detail, overflow="fold"))
    return table


def summary_of(rows: list[Row]) -> str:
    """Return how many files and folders are there, wrong and missing, in a line."""
    numbers = Counter(row.status for row in rows)
    wrong, missing = numbers["wrong"], numbers["missing"]
    files = len(rows) - numbers["embedded"]
    return f"{files} files and folders: {wrong} wrong, {missing} missing (fine until a run needs them)"
