"""The locks of the extras that are installed on top of requirements.lock, without their dependencies."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("cluster", "dense")
ENTRY = re.compile(r"([a-z][\w.-]*)==([^\s;\\]+)( ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def locked_versions(file: str) -> dict[str, str]:
    """Return the versions of a lock by their names, after a check that it holds nothing but entries with hashes."""
    text = re.sub(r"^#.*\n", "", (ROOT / file).read_text(encoding="utf-8"), flags=re.M)
    entries = list(ENTRY.finditer(text))
    assert "".join(entry.group() for entry in entries) == text, f"{file} holds a line without hashes"
    names = [entry[1] for entry in entries]
    assert len(set(names)) == len(names), f"{file} names a package twice"
    return {entry[1]: entry[2] for entry in entries}


def requirements(extra: str) -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["project"]["optional-dependencies"][extra]


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_lock_of_an_extra_holds_its_requirements_with_hashes_and_nothing_else(extra):
    locked = locked_versions(f"requirements-{extra}.lock")
    named = {re.match(r"[\w-]+", requirement).group() for requirement in requirements(extra)}
    assert set(locked) == named
    exact = dict(requirement.split("==") for requirement in requirements(extra) if "==" in requirement)
    assert {name: locked[name] for name in exact} == exact


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_lock_of_an_extra_contradicts_neither_the_main_lock_nor_another_extra(extra):
    locked = locked_versions(f"requirements-{extra}.lock")
    files = ["requirements.lock", *(f"requirements-{other}.lock" for other in EXTRAS)]
    for other in map(locked_versions, files):
        assert {name: other[name] for name in locked.keys() & other} == {n: locked[n] for n in locked.keys() & other}


def test_the_lock_for_detection_and_segmentation_adds_to_the_main_lock_and_repeats_nothing():
    assert not locked_versions("requirements-dense.lock").keys() & locked_versions("requirements.lock").keys()


def test_detection_and_segmentation_are_installed_from_wheels_by_hash_alone():
    rule = re.search(r"^setup-dense:.*\n\t(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:", "requirements-dense.lock"} <= set(rule.split())
