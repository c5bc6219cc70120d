"""What our kernels are timed beside on a GPU and which is no dependency of ours: mamba-ssm's CUDA scan."""

import os
from pathlib import Path

import torch

from shared.errors import UserError


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
