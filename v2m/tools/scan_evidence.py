"""What a scan's GPU evidence needs beside ``shared/bench/gpu.py``: checks side by side, bars, mamba-ssm's scan."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch

from shared.errors import UserError

CHECKERS = min(16, os.cpu_count() or 1)  # processes that check, most of whose time goes into compiling


def _strictly(check: Callable[..., dict], case: dict) -> dict:
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory holds NaN
    try:
        return check(**case)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def checks_of(check: Callable[..., dict], cases: list[dict]) -> list[dict]:
    """Return what ``check`` says of every case, in fresh memory that holds NaN; CHECKERS processes share them."""
    if CHECKERS == 1:
        return [_strictly(check, case) for case in cases]
    with ProcessPoolExecutor(CHECKERS, get_context("spawn")) as pool:
        return list(pool.map(_strictly, repeat(check), cases))


def verdict_on(bar: dict) -> str:
    """Return in words whether a bar is met: a dict of its name ``bar``, ``measured``, ``wanted`` and ``holds``."""
    return f"{bar['bar']}: {bar['measured']:.2f}, wanted {bar['wanted']}: {'holds' if bar['holds'] else 'missed'}"


def mamba_ssm(source: Path | None):
    """Return mamba-ssm's CUDA extension, installed or compiled from its source folder; None without either."""
    if source is not None:
        from torch.utils.cpp_extension import load

        folder = source / "csrc" / "selective_scan"
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: give the folder of mamba-ssm's source with --mamba-ssm-source")
        os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
        files = [str(path) for path in (*folder.glob("*.cpp"), *folder.glob("*.cu"))]
        flags = ["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
        flags += [f"-U__CUDA_NO_{kind}_OPERATORS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162", "HALF2")]
        flags += [f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162")]
        return load("selective_scan_cuda", files, extra_include_paths=[str(folder)], extra_cuda_cflags=flags)
    try:
        import selective_scan_cuda
    except ImportError:
        return None
    return selective_scan_cuda


def mamba_ssm_or_reason(source: Path | None):
    """Return mamba-ssm's extension, or in words why there is none."""
    try:
        return mamba_ssm(source) or "not installed, and no source folder was given"
    except UserError:
        raise
    except Exception as error:  # a compiler's, of any kind
        return f"could not be built: {' '.join(str(error).split())[-300:]}"
