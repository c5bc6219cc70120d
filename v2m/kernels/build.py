"""Compiles a kernel's C++ once for this machine's vector instructions and keeps the result in the user's cache.

The library speaks plain C: it needs no torch headers and outlives torch's upgrades. It stands in
``$XDG_CACHE_HOME/visrep`` (default ``~/.cache/visrep``) under a hash of its sources, the flags and the compiler,
so a change of any of them compiles anew and processes that start together never see half a file.
``$CXX`` names the compiler, ``$VISREP_CPU_LEVEL`` forces avx512, avx2 or plain.
"""

import ctypes
import functools
import hashlib
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

PROCESS = os.getpid()
# Fused multiply-adds in one expression are what the kernels are written for; nothing else is reordered.
# The loops are vectors already, so the compiler's own search for them is left out: it takes a second.
FLAGS = (
    "-std=c++17 -O3 -fno-tree-vectorize -fPIC -shared -pthread"
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
)
AVX2 = "-mavx2 -mfma -mf16c"
LEVELS = {
    "avx512": f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512",
    "avx2": AVX2,
    "plain": "",
}
SECONDS = 300  # after which a compiler is taken to hang


class BuildError(Exception):
    """The library cannot be made here; the text says why in one sentence."""


def supported() -> list[str]:
    """Return the levels of vector instructions that this machine has, the widest first."""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "plain")
    levels = list(LEVELS)
    return levels[levels.index(best) :]


def level() -> str:
    """Return the level to compile for; BuildError where the environment asks for one that cannot run."""
    asked = os.environ.get("VISREP_CPU_LEVEL", "")
    if asked and asked not in supported():
        raise BuildError(f"VISREP_CPU_LEVEL={asked} is not one of this machine's: {', '.join(supported())}")
    return asked or supported()[0]


def load(source: Path) -> ctypes.CDLL:
    """Return the library of a C++ file and the headers beside it and in this folder, named after its folder.

    Compiled in a few seconds on first use; BuildError where that is not possible.
    """
    return _load(source, level(), os.environ.get("CXX", ""), cache_folder())


def parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch is linked to, None without one.

    A second runtime in one process would fight torch's for the cores. In a forked process the runtime's threads
    are gone: None there too, and the kernel starts threads of its own.
    """
    return None if _forked() else _gomp_parallel()


def _forked() -> bool:
    """Return whether this process was forked, from one that may have used torch's threads before."""
    if os.getpid() != PROCESS:
        return True
    child = multiprocessing.parent_process() is not None
    return child and multiprocessing.get_start_method(allow_none=True) == "fork"


@functools.cache
def _gomp_parallel() -> int | None:
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def cache_folder() -> Path:
    """Return the folder of compiled libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "visrep"


@functools.cache
def _load(source: Path, name: str, cxx: str, folder: Path) -> ctypes.CDLL:
    compiler = _compiler(cxx)
    flags = f"{FLAGS} {LEVELS[name]}".split()
    library = folder / f"{source.parent.name}-{name}-{_fingerprint(source, compiler, flags)}.so"
    if not library.exists():
        _compile(source, compiler, flags, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load ({error}): delete it") from error


def _compiler(cxx: str) -> list[str]:
    """Return the command of the first C++ compiler there is."""
    for command in (shlex.split(cxx), ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler is here: install g++ or clang++, or name one in CXX")


def _fingerprint(source: Path, compiler: list[str], flags: list[str]) -> str:
    parts = [*flags, *compiler, platform.machine(), _run([*compiler, "--version"])]
    headers = [*sorted(source.parent.glob("*.h")), *sorted(Path(__file__).parent.glob("*.h"))]
    parts += [file.read_text() for file in (source, *headers)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(source: Path, compiler: list[str], flags: list[str], library: Path) -> None:
    """Write the library whole or not at all."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
            made = Path(folder) / library.name
            _run([*compiler, *flags, str(source), "-o", str(made)])
            made.replace(library)
    except OSError as error:
        text = f"{library.name} cannot be written to {library.parent} ({error}): set XDG_CACHE_HOME"
        raise BuildError(text) from error


def _run(command: list[str]) -> str:
    """Return what a command prints; BuildError with its first complaint where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot run ({error})") from error
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        complaint = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} cannot compile {command[-3]}: {complaint}")
    return done.stdout
