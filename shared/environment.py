"""What a record says of the code and the machine: commit, lock, hardware, versions, memory, energy."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

LIBRARIES = ("torch", "lightning", "numpy", "scikit-learn")
EXTRA = ("torchvision", "mmcv", "mmcv-lite", "mmdet", "mmengine", "mmsegmentation", "pycocotools")


def repository_root() -> Path:
    """Return the folder that holds the papers of this repository."""
    return Path(__file__).resolve().parents[1]


def _first_match(path: str, prefix: str) -> str | None:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(prefix)), None)


def environment() -> dict:
    """Return ``hardware``, ``driver`` and ``versions`` of this machine, ready to be put into a record."""
    import torch  # whoever only reads records does without it

    memory = _first_match("/proc/meminfo", "MemTotal")
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    for library in EXTRA:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "hardware": {
            "cpu": _first_match("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": int(memory.split()[0]) * 1024 if memory else None,
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "driver": _first_match("/proc/driver/nvidia/version", "NVRM version"),
        "versions": {"python": platform.python_version(), **versions},
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


_earlier_peak = 0  # when the system was last told to forget it


def peak_memory_bytes() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, _earlier_peak)  # Linux counts in KiB


def forget_peak() -> bool:
    """Make the system (Linux) count this process's peak from now on, and return whether it does.

    ``peak_memory_bytes`` keeps what was before.
    """
    global _earlier_peak
    before = peak_memory_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    _earlier_peak = before
    return True


def resident_bytes(key: str) -> int:
    """Return this process's resident memory now (VmRSS) or at its peak (VmHWM), in bytes; Linux only."""
    return int(_first_match("/proc/self/status", f"{key}:").split()[0]) * 1024


def energy_joules() -> float | None:
    """Return what all GPUs have used since start-up in joules (subtract two calls), None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000 or None
    except Exception:  # no package, no driver, or a GPU without a counter: there is nothing to report
        return None


def begin_measurement(root) -> Callable[[], dict]:
    """Note commit, time and energy now; returns what gives, at the end of a run, all that its record says of them."""
    started, begin, energy = datetime.now(UTC), time.perf_counter(), energy_joules()
    commit, dirty = git_state(root)

    def finish() -> dict:
        return environment() | {
            "commit": commit,
            "dirty": dirty,
            "lock_sha256": lock_sha256(root),
            "wall_seconds": time.perf_counter() - begin,
            "peak_memory_bytes": peak_memory_bytes(),
            "energy_joules": None if energy is None else energy_joules() - energy,
            "started_at": started.isoformat(timespec="seconds"),
        }

    return finish
