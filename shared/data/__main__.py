"""``python -m shared.data --root DIR`` (part of ``make data-check``): which data are there, and are they right.

Of scenes the paper's own check says more (``pdml/tools/data_check.py``). Exit code 0 when nothing that is there is
wrong (missing is only said), 2 for a wrong file or a bad root.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.commands import Parser, report
from shared.data.folders import list_images, require_checksum
from shared.data.manifest import DataFile, ImageFolder, Manifest, checked_root, load_manifest, locate, manifest_names
from shared.errors import UserError

Check = Callable[[Manifest, DataFile, Path], str]  # a phrase on what a file holds; UserError for a wrong one


class Row(NamedTuple):
    """One line of the table; status: embedded, present, recorded, counted, missing or wrong."""

    manifest: str
    file: str
    status: str
    detail: str


def check_file(manifest: Manifest, entry: DataFile, root: Path) -> str:
    """Return what is to be said of a file that is there, nothing; UserError where its checksum differs."""
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


def _row(manifest: Manifest, entry: DataFile | ImageFolder, root: Path, check: Check) -> Row:
    is_file = isinstance(entry, DataFile)
    status, detail = "missing", f"{entry.note if is_file else ''} Source: {manifest.source}".strip()
    if entry.is_in(root):
        try:
            detail = (check if is_file else _check_folder)(manifest, entry, root)
            status = "present" if entry.sha256 else "recorded" if is_file else "counted"
        except UserError as error:
            status, detail = "wrong", str(error)
    return Row(manifest.name, entry.path, status, detail)


def check_all(data_root: str | Path | None, scenes: bool = False, check: Check = check_file) -> list[Row]:
    """Return a row for every file and folder of the manifests, those of ``scenes`` or all others."""
    root, rows = checked_root(data_root, "set DATA_ROOT=<folder>, which holds the data sets"), []
    for manifest in map(load_manifest, manifest_names()):
        if manifest.is_scene == scenes:
            entries = [_row(manifest, entry, root, check) for entry in [*manifest.files, *manifest.folders]]
            rows += entries or [Row(manifest.name, "-", "embedded", manifest.source)]
    return rows


def main(arguments: list[str] | None = None, scenes: bool = False, check: Check = check_file) -> int:
    """Print the table of ``check_all`` and return the exit code."""
    parser = Parser(prog="make data-check", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=os.environ.get("DATA_ROOT"), help="the data root, else DATA_ROOT")
    try:
        rows = check_all(parser.parse_args(arguments).root, scenes, check)
    except UserError as error:
        return report(error)
    table = Table("data set", "file", "status", "detail")
    for name, file, status, detail in rows:
        colour = {"wrong": "red", "missing": "yellow"}.get(status, "green")
        table.add_row(name, Text(file, overflow="fold"), Text(status, colour), Text(detail, overflow="fold"))
    Console().print(table)
    numbers = Counter(row.status for row in rows)
    files = len(rows) - numbers["embedded"]
    wrong, missing = numbers["wrong"], numbers["missing"]
    print(f"{files} files and folders: {wrong} wrong, {missing} missing (fine until a run needs them)")
    for row in rows:
        if row.status == "wrong":
            print(row.detail, file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
