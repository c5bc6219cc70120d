"""The rules of the house that a scan can see: sizes, imports, layers, devices, paths, the Makefile and the lock."""

import ast
import importlib.metadata
import re
import statistics
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS = tuple(sorted(path.parent.name for path in ROOT.glob("*/metafile.yml")))
MOST_LINES_TOY = 150  # of the Python of a paper: all that it takes to stand on shared
MOST_LINES, MOST_LINES_KERNEL, MOST_LINES_FUNCTION, MEDIAN_LINES = 400, 500, 59, 120
# A GPU kernel takes dozens of pointers and strides, and its values live in registers from its first line to its last:
# a part of it would have to be handed all of them.
MOST_LINES_GPU_FUNCTION = 140
# All lines of Python, empty ones and docstrings too, in files outside of tests/ and of testing/, which is test code.
# Raised by 120 and 40: validation after every epoch, and the end of a training that diverged, are every paper's; then
# by 30: rows of detection and segmentation in the ledger, and folders of images without classes.
MOST_LINES_SHARED, MOST_LINES_TRAINING = 3950, 940
# Counted apart from shared's: an optional extra, which is read only for detection and segmentation.
MOST_LINES_DENSE = 1700
MOST_YAML_FILES, MOST_LINES_README, MOST_LINES_PAPERS_README = 330, 150, 120
COMMANDS = "commands"  # the programs behind make: they start papers, and nothing imports them
# From below: a file of shared imports its own layer's and those before it; testing alone is above claims.
LAYERS = (
    ("errors", "environment", "files", "command_line", "records"),
    ("data",),
    ("metrics",),
    ("training",),
    ("dense",),
    ("claims",),
    ("bench", "testing"),
)
PROTOCOL = ROOT / "shared/claims/protocol.py"  # the only file that may import a module by a name made at run time
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
    def prints(path: Path) -> bool:
        return path.name == "__main__.py"

    lines = {path: forbidden_calls(parse(path), entry_point=prints(path)) for path in python_files(False)}
    assert [where(path, line) for path, numbers in lines.items() for line in numbers] == []


@pytest.mark.parametrize(
    "line", ["print(1)", "x.cuda()", "torch.device('cuda:0')", "x.to('cuda')", "x.to(device='cuda')"]
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


def modules() -> dict[str, Path]:
    """Return the modules of all packages by their dotted names."""
    found = {}
    for path in python_files(False):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("shared", COMMANDS, *PAPERS):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or place.is_dir()


def imported_names(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere in it, functions included, relative ones made absolute."""
    names, package = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            parts = {f"{base}.{alias.name}" for alias in node.names}
            names |= {part for part in parts if is_module(part)} | {base for part in parts if not is_module(part)}
    return names


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


def import_graph() -> dict[str, set[str]]:
    """Return for every module of ours those that it imports."""
    known = modules()
    return {name: (imported_names(path) & known.keys()) - {name} for name, path in known.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes that a path of the graph leads back to."""

    def reachable(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            new = graph.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    return sorted(node for node in graph if node in reachable(node))


def package_of(name: str, known: dict[str, Path]) -> str:
    return name if known[name].name == "__init__.py" else name.rpartition(".")[0]


def package_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    known, packages = modules(), {}
    for name, imported in graph.items():
        package = package_of(name, known)
        packages.setdefault(package, set()).update({package_of(other, known) for other in imported} - {package})
    return packages


def test_no_file_imports_itself_by_way_of_others():
    assert len(import_graph()) > 100 and circles(import_graph()) == []


def test_no_folder_imports_itself_by_way_of_others():
    assert circles(package_graph(import_graph())) == []


def test_the_search_for_circles_finds_one():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == ["b", "c"]


def layer_of(name: str) -> int | None:
    part = name.split(".")[1] if "." in name else None
    return next((number for number, parts in enumerate(LAYERS) if part in parts), None)


def test_no_file_of_shared_imports_from_a_layer_above_its_own():
    graph = {name: ahead for name, ahead in import_graph().items() if name.startswith("shared.")}
    assert [name for name in graph if layer_of(name) is None] == []
    upward = [(n, o) for n, ahead in graph.items() for o in ahead if o != "shared" and layer_of(o) > layer_of(n)]
    assert upward == []


def test_only_the_protocol_imports_a_module_by_its_name():
    def dynamic(path: Path) -> bool:
        by_name = {"import_module", "__import__", "load_module", "exec_module", "run_module", "get_method", "get_class"}
        names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(parse(path))}
        return bool(names & by_name) or "importlib" in imported_names(path)

    inside = [path for path in python_files(False) if path.relative_to(ROOT).parts[0] == "shared"]
    files = [path for path in inside if "testing" not in path.parts]  # what tests share starts papers by their names
    assert [path for path in files if dynamic(path)] == [PROTOCOL]


def lines_below(folder: str) -> int:
    files = [path for path in python_files(False) if path.is_relative_to(ROOT / folder)]
    apart = {"testing"} | ({"dense"} - set(Path(folder).parts))
    return sum(lines_of(path) for path in files if not apart & set(path.relative_to(ROOT).parts))


LIMITS = {"shared": MOST_LINES_SHARED, "shared/training": MOST_LINES_TRAINING, "shared/dense": MOST_LINES_DENSE}


@pytest.mark.parametrize(("folder", "most"), LIMITS.items())
def test_shared_stays_thin(folder, most):
    assert 0 < lines_below(folder) <= most


def test_a_paper_can_be_a_small_folder():
    toy = [path for path in repository_files() if path.is_relative_to(ROOT / "shared/tests/papers/toy")]
    code = [path for path in toy if path.suffix == ".py" and "tests" not in path.parts[-2:-1]]
    assert {path.name for path in code} >= {"config.py", "model.py", "train.py", "evaluate.py"}
    assert sum(map(lines_of, code)) <= MOST_LINES_TOY


def test_the_papers_have_few_configuration_files():
    files = [path for path in repository_files() if path.suffix in (".yaml", ".yml")]
    inside = [path for path in files if path.relative_to(ROOT).parts[:2] in [(paper, "configs") for paper in PAPERS]]
    assert 0 < len(inside) <= MOST_YAML_FILES


@pytest.mark.parametrize("folder", ("", *PAPERS))
def test_a_readme_is_read_in_three_minutes(folder):
    assert lines_of(ROOT / folder / "README.md") <= (MOST_LINES_PAPERS_README if folder else MOST_LINES_README)


@pytest.mark.parametrize("package", ("shared", *PAPERS))
def test_a_paper_imports_no_other_paper_and_shared_imports_none(package):
    others = {COMMANDS, *PAPERS} - {package}
    files = [path for path in python_files(True) if path.relative_to(ROOT).parts[0] == package]
    assert [where(path, 1) for path in files if imported_packages(path) & others] == []


def test_every_paper_that_exists_is_under_the_import_contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    linter, include = settings["importlinter"], settings["setuptools"]["packages"]["find"]["include"]
    independence, library, papers, layers = linter["contracts"]
    existing = {paper for paper in PAPERS if (ROOT / paper / "__init__.py").exists()}
    assert set(linter["root_packages"]) == existing | {"shared", COMMANDS}
    assert set(independence["modules"]) == existing
    assert (library["source_modules"], set(library["forbidden_modules"])) == (["shared"], existing | {COMMANDS})
    assert (set(papers["source_modules"]), papers["forbidden_modules"]) == (existing, [COMMANDS])
    listed = [{part.strip(" ()") for part in layer.split(":")} for layer in layers["layers"]]
    assert listed == [{f"shared.{part}" for part in parts} for parts in reversed(LAYERS)]
    assert set(include) == {form for name in ("shared", COMMANDS, *PAPERS) for form in (name, f"{name}.*")}


def test_make_help_lists_every_target_with_one_line():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name.replace("%", "<paper>") for name in re.findall(r"^([a-z][\w%-]*):(?!=)", text, re.M)}
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
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
