"""The rules of the house that a scan can see: sizes, imports, devices, paths, the Makefile and the lock."""

import ast
import importlib.metadata
import re
import statistics
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("globalmamba", "v2m", "idml", "pdml", "opera")
MOST_LINES, MOST_LINES_KERNEL, MOST_LINES_FUNCTION, MEDIAN_LINES = 400, 500, 59, 120
# A GPU kernel takes dozens of pointers and strides, and its values live in registers from its first line to its last:
# a part of it would have to be handed all of them.
MOST_LINES_GPU_FUNCTION = 140
ENTRY_POINTS = ("__main__.py", "cli.py")
# Joined from pieces so that this file keeps its own rule. Behind a letter, a dot, a slash or a closing brace
# a match would be part of another path: an address on the web, a relative path, a variable.
FOLDERS = "|".join(("home", "tmp", "work", "root"))
MACHINE_PATH = re.compile(rf"(?<![\w./~}}-])/(?:{FOLDERS})(?![\w-])")
REGISTRY_HOST = re.compile(r"\b(?:pypi|pythonhosted|docker|gcr|ghcr|nvcr|quay|pkg)\.(?:org|io|com|dev)\b")


def repository_files() -> list[Path]:
    """Return the files that git tracks or would track, those of uncommitted work included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted(path for name in set(listed.split("\0")) - {""} if (path := ROOT / name).is_file())


def python_files(with_tests: bool) -> list[Path]:
    files = [path for path in repository_files() if path.suffix == ".py"]
    return [path for path in files if with_tests or "tests" not in path.parent.parts]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def is_text(path: Path) -> bool:
    return b"\0" not in path.read_bytes()


def test_no_file_is_too_long():
    def limit(path):
        return MOST_LINES_KERNEL if "kernels" in path.parts else MOST_LINES

    assert [where(path, lines_of(path)) for path in python_files(True) if lines_of(path) > limit(path)] == []


def test_the_median_file_is_short():
    assert statistics.median(lines_of(path) for path in python_files(False)) <= MEDIAN_LINES


def test_no_function_is_too_long():
    functions = [
        (path, node)
        for path in python_files(False)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]

    def limit(function) -> int:
        on_gpu = any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        return MOST_LINES_GPU_FUNCTION if on_gpu else MOST_LINES_FUNCTION

    too_long = [where(p, f.lineno) for p, f in functions if f.end_lineno - f.lineno + 1 > limit(f)]
    assert functions and too_long == []


def forbidden_calls(tree: ast.Module, entry_point: bool) -> list[int]:
    """Return the lines that print (outside an entry point) or name a CUDA device."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "device")]
        on_cuda = any(isinstance(v, ast.Constant) and str(v.value).startswith("cuda") for v in values)
        prints = isinstance(call.func, ast.Name) and name == "print" and not entry_point
        if prints or name == "cuda" or (name in ("device", "to") and on_cuda):
            lines.append(call.lineno)
    return lines


def test_library_code_neither_prints_nor_names_a_cuda_device():
    found = [
        where(path, line)
        for path in python_files(False)
        for line in forbidden_calls(parse(path), entry_point=path.name in ENTRY_POINTS)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["print(1)", "x.cuda()", "torch.device('cuda:0')", "x.to('cuda')", "x.to(device='cuda')"],
)
def test_the_scan_for_prints_and_devices_sees(line):
    assert forbidden_calls(ast.parse(line), entry_point=False) == [1]


@pytest.mark.parametrize("start, seen", [('"', True), ("=", True), ("..", False), ("${DIR}", False)])
def test_the_scan_for_paths_sees_absolute_ones_only(start, seen):
    assert bool(MACHINE_PATH.search(start + "/".join(["", "home", "x"]))) == seen


def test_no_file_holds_a_path_of_one_machine():
    found = [
        where(path, number)
        for path in filter(is_text, repository_files())
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_no_file_names_the_host_of_a_registry():
    found = [
        str(path.relative_to(ROOT))
        for path in filter(is_text, repository_files())
        if REGISTRY_HOST.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ("shared", *PAPERS))
def test_a_paper_imports_no_other_paper_and_shared_imports_none(package):
    others = set(PAPERS) - {package}
    files = [path for path in python_files(True) if path.relative_to(ROOT).parts[0] == package]
    assert [where(path, 1) for path in files if imported_packages(path) & others] == []


def test_every_paper_that_exists_is_under_the_import_contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    linter, include = settings["importlinter"], settings["setuptools"]["packages"]["find"]["include"]
    independence, forbidden = linter["contracts"]
    existing = {paper for paper in PAPERS if (ROOT / paper / "__init__.py").exists()}
    assert set(linter["root_packages"]) == existing | {"shared"}
    assert set(independence["modules"]) == existing
    assert (forbidden["source_modules"], set(forbidden["forbidden_modules"])) == (["shared"], existing)
    assert set(include) == {form for name in ("shared", *PAPERS) for form in (name, f"{name}.*")}


def test_make_help_lists_every_target_with_one_line():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name.replace("%", "<paper>") for name in re.findall(r"^([a-z][\w%-]*):(?!=)", text, re.M)}
    shown = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    described = dict(line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  "))
    assert {"setup", "test", "reproduce", "reproduce-<paper>", "evaluate-<paper>"} <= targets
    assert set(described) == targets


def locked_versions() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z])", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    versions = {}
    for entry in entries:
        name, version = re.match(r"([\w.-]+)==([^\s;]+)", entry).groups()
        assert versions.setdefault(name, version) == version, f"{name} is locked at two versions"
    return versions


def test_the_lock_has_every_direct_dependency_with_hashes_and_one_version_each():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = locked_versions()
    assert not any("+" in version for version in locked.values()), "a local build is in the lock"
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name, operator, version = re.match(r"([\w-]+)(==|~=|>=)([\w.]+)", requirement).groups()
        assert name in locked and (operator != "==" or locked[name] == version), requirement


@pytest.mark.parametrize("name", ["torch", "lightning", "numpy"])
def test_this_python_runs_the_versions_of_the_lock(name):
    assert importlib.metadata.version(name).split("+")[0] == locked_versions()[name]
