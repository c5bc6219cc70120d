"""What GlobalMamba and V2M have in common stands in both papers byte by byte: twins.txt names the files.

No paper imports another, so a common file is copied; this test keeps the copies from drifting apart.
"""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST, SECOND = "globalmamba", "v2m"
NEARLY = 0.8  # of the lines: files that are equal to this degree were copied from each other
LEAST_LINES = 8  # a file of fewer is equal by chance
TEXT = {".py", ".cpp", ".h", ".yaml", ".yml"}
PAPER_NAME = re.compile(rf"\b({FIRST}|{SECOND}|GlobalMamba|V2M)\b")


def listed() -> tuple[list[str], list[str]]:
    """Return the paths of twins, and of files that are nearly equal on purpose (``~ path  # reason``)."""
    lines = Path(__file__).with_name("twins.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.partition("#")[0].strip() for line in lines]
    twins = [entry for entry in entries if entry and not entry.startswith("~")]
    return twins, [entry.removeprefix("~").strip() for entry in entries if entry.startswith("~")]


TWINS, ALIKE = listed()


def first_difference(ours: bytes, theirs: bytes) -> str | None:
    """Return the first line that differs, with its number; None for equal contents."""
    if ours == theirs:
        return None
    lines = zip(ours.splitlines(), theirs.splitlines(), strict=False)
    for number, (our_line, their_line) in enumerate(lines, 1):
        if our_line != their_line:
            return f"line {number}: {our_line[:80]!r} and {their_line[:80]!r}"
    return "one ends before the other"


def likeness(ours: str, theirs: str) -> float:
    """Return how many of the lines are equal, between 0 and 1, the papers' names aside."""
    pages = [[line.strip() for line in PAPER_NAME.sub("PAPER", text).splitlines()] for text in (ours, theirs)]
    first, second = ([line for line in page if line] for page in pages)
    if min(len(first), len(second)) < LEAST_LINES:
        return 0.0
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(len(first), len(second))


def common_paths() -> list[str]:
    """Return the relative paths that both papers have; results are measured, not written."""
    paths = []
    for file in sorted((ROOT / FIRST).rglob("*")):
        path = file.relative_to(ROOT / FIRST)
        if file.suffix in TEXT and "results" not in path.parts and (ROOT / SECOND / path).is_file():
            paths.append(path.as_posix())
    return paths


def imports_of(source: str) -> set[str]:
    """Return the packages that a module imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", TWINS)
def test_a_twin_is_the_same_file_in_both_papers(path):
    ours, theirs = ROOT / FIRST / path, ROOT / SECOND / path
    assert ours.is_file() and theirs.is_file(), f"{path} is missing in one of the papers: copy it or unlist it"
    difference = first_difference(ours.read_bytes(), theirs.read_bytes())
    later, earlier = sorted((ours, theirs), key=lambda file: file.stat().st_mtime, reverse=True)
    command = f"cp {later.relative_to(ROOT)} {earlier.relative_to(ROOT)}"
    assert difference is None, f"{path} differs, {difference}; copy the later one: {command}"


@pytest.mark.parametrize("path", [path for path in TWINS if path.endswith(".py")])
def test_a_twin_imports_nothing_from_its_paper_by_name(path):
    source = (ROOT / FIRST / path).read_text(encoding="utf-8")
    assert not imports_of(source) & {FIRST, SECOND}, f"{path}: use relative imports"
    assert not PAPER_NAME.search(source), f"{path} names a paper, but stands in both"


def test_every_file_that_both_papers_have_alike_is_listed():
    known = {*TWINS, *ALIKE}
    texts = {path: [(ROOT / paper / path).read_text() for paper in (FIRST, SECOND)] for path in common_paths()}
    unlisted = {
        path: round(likeness(*pair), 2)
        for path, pair in texts.items()
        if path not in known and (likeness(*pair) > NEARLY or (pair[0] and pair[0] == pair[1]))
    }
    assert not unlisted, f"make these twins and name them in tests/twins.txt, or say there why not: {unlisted}"


@pytest.mark.parametrize("path", ALIKE)
def test_files_that_are_nearly_equal_on_purpose_still_are(path):
    ours, theirs = ((ROOT / paper / path).read_text(encoding="utf-8") for paper in (FIRST, SECOND))
    assert PAPER_NAME.search(ours) or ours != theirs, f"{path} is the same in both: list it as a twin"
    assert likeness(ours, theirs) > NEARLY, f"{path} is not nearly equal any more: take it off tests/twins.txt"


def test_a_difference_a_copy_and_an_absolute_import_are_noticed():
    assert first_difference(b"a\nb\n", b"a\nc\n") == "line 2: b'b' and b'c'"
    assert first_difference(b"a\n", b"a\nb\n") == "one ends before the other"
    page = "\n".join(f"line {number} of {FIRST}" for number in range(10))
    assert likeness(page, page.replace(FIRST, SECOND)) == 1.0
    assert likeness(page, page.replace("line", "row")) == 0.0
    assert imports_of(f"import {FIRST}.data\nfrom {SECOND} import train\nfrom . import x") == {FIRST, SECOND}
