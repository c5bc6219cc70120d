"""The evidence of one run: one JSON file per row and seed, written atomically and only at the end.

A record says what was measured, with which configuration, code, data and machine. The hash of the
configuration covers only what can change a number: moving data or changing a logger makes nothing stale.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shared.errors import UserError

# top-level groups that cannot change a number; everything else is hashed
EXCLUDED = ("paths", "logging", "launcher", "trainer", "output", "paper", "row")
LIBRARIES = ("torch", "lightning", "numpy", "scikit-learn")


def _without_nan(value):
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunRecord(BaseModel):
    """One run of one row with one seed; null stands for a metric that is not defined (JSON has no NaN)."""

    model_config = ConfigDict(extra="forbid")

    paper: str
    row: str
    scale: str
    seed: int
    selection: str
    variant: str
    metrics: dict[str, float | list | str | None]
    n_test: int
    config: dict[str, Any]
    config_sha256: str
    commit: str
    dirty: bool
    lock_sha256: str | None
    manifest_sha256: str | None
    hardware: dict[str, Any]
    driver: str | None
    versions: dict[str, str]
    wall_seconds: float
    peak_memory_bytes: int
    energy_joules: float | None = None
    started_at: str

    @field_validator("metrics", mode="after")
    @classmethod
    def _nan_is_null(cls, metrics: dict) -> dict:
        return {name: _without_nan(value) for name, value in metrics.items()}


def record_path(results, scale: str, row: str, seed: int) -> Path:
    """Return where the evidence of a row and seed stands in a paper's folder of results."""
    return Path(results) / scale / row / f"seed{seed}.json"


def _drop(tree: dict, keys: list[str], neutral) -> None:
    head, rest = keys[0], keys[1:]
    if head not in tree:
        return
    if rest:
        if isinstance(tree[head], dict):
            _drop(tree[head], rest, neutral)
            if not tree[head]:  # a group that only held neutral keys is as good as absent
                del tree[head]
    elif tree[head] == neutral and isinstance(tree[head], bool) == isinstance(neutral, bool):
        del tree[head]


def config_sha256(config: dict, neutral: dict[str, Any] | None = None, excluded=EXCLUDED) -> str:
    """Return the sha256 of all in a resolved config that can change a number.

    Top-level keys in ``excluded`` are left out, and so is every dotted key of ``neutral`` while it has its
    neutral value. The rest is hashed as JSON with sorted keys. The caller puts ``manifest_sha256`` under
    ``data``.
    """
    kept = json.loads(json.dumps({key: value for key, value in config.items() if key not in excluded}))
    for dotted, value in (neutral or {}).items():
        _drop(kept, dotted.split("."), value)
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_record(path, record: RunRecord, overwrite: bool = False) -> None:
    """Write a record so that at any moment the file is whole or absent; UserError if it is there already."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} already holds evidence: delete it first if the run is to be repeated.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(record.model_dump(), stream, indent=1, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_record(path) -> RunRecord:
    """Read a record; UserError that names the file if it is absent, truncated or malformed."""
    remedy = "delete it and run the row again, or restore it with git checkout."
    try:
        return RunRecord.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the row first.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is not a run record ({where}: {first['msg']}): {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not JSON ({error}): {remedy}") from error


def _first_match(path: str, prefix: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(prefix)), None)


def environment() -> dict:
    """Return ``hardware``, ``driver`` and ``versions`` of this machine, ready to be put into a record."""
    import torch

    memory = _first_match("/proc/meminfo", "MemTotal")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hardware": {
            "cpu": _first_match("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "memory_bytes": int(memory.split()[0]) * 1024 if memory else None,
            "gpus": gpus,
        },
        "driver": _first_match("/proc/driver/nvidia/version", "NVRM version"),
        "versions": versions,
    }


def git_state(root) -> tuple[str, bool]:
    """Return the commit and whether tracked files outside results/ differ; ("unknown", True) without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        paths = (".", ":(exclude,glob)**/results/**")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit, bool(changed)


def lock_sha256(root) -> str | None:
    """Return the sha256 of requirements.lock, None where there is none."""
    lock = Path(root) / "requirements.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None


_forgotten = 0  # the peak when the system was last told to forget it


def peak_memory_bytes() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, _forgotten)  # Linux counts in KiB


def forget_peak() -> bool:
    """Make the system (Linux) count this process's peak from now on, and return whether it does.

    ``peak_memory_bytes`` keeps what was before.
    """
    global _forgotten
    before = peak_memory_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    _forgotten = before
    return True


def energy_joules() -> float | None:
    """Return what all GPUs have used since start-up in joules (subtract two calls), None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000 or None
    except Exception:  # no package, no driver, or a GPU without a counter: there is nothing to report
        return None
