"""The short convolution on the CPU in C++ (cpu.cpp), called through ctypes."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from globalmamba.kernels import build

KERNELS = (2, 3, 4)  # taps
TAKEN = "float32 or float64 on the CPU, 2 to 4 taps"
SOURCE = Path(__file__).with_name("cpu.cpp")
NUMBERS = ("batch", "length", "width", "kernel", "directions", "is_double", "dout_batch", "dout_step")
POINTERS = ("x", "weight", "bias", "out", "dout", "dx", "rows")


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


def unavailable() -> str:
    """Return why this backend cannot run here, or an empty text; compiles on first use."""
    try:
        _library()
    except build.BuildError as error:
        return str(error)
    return ""


def takes(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether the kernel is made for such tensors."""
    same = x.dtype == weight.dtype == bias.dtype and x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and same and weight.shape[2] in KERNELS


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, L, D), (R, D, K), (R, D) -> (B, L, R D)."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:2], bias.numel())
    _run(x, weight, bias, out=out)
    return out


def backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to x, weight and bias, bitwise the same whatever the number of threads."""
    x = x.contiguous()
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    directions, width, kernel = weight.shape
    dx, rows = torch.empty_like(x), x.new_empty(len(x), directions, kernel + 1, width)
    _run(x, weight, bias, dout=dout, dx=dx, rows=rows)
    total, *others = rows.unbind(0)
    for other in others:
        total += other
    return dx, total[:, :kernel].transpose(1, 2).contiguous(), total[:, kernel].contiguous()


def _run(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor | None = None, **results: Tensor) -> None:
    if not takes(x, weight, bias) or (dout is not None and dout.dtype != x.dtype):
        raise ValueError(f"the compiled form takes {TAKEN}, all tensors alike")
    directions, width, kernel = weight.shape
    strides = (0, 0) if dout is None else dout.stride()[:2]
    numbers = (*x.shape, kernel, directions, int(x.dtype == torch.float64), *strides)
    kept = {"x": x, "weight": weight.transpose(1, 2).contiguous(), "bias": bias.contiguous(), "dout": dout}
    pointers = {name: t.data_ptr() for name, t in (kept | results).items() if t is not None}
    conv = _Conv(**dict(zip(NUMBERS, numbers, strict=True)), **pointers)
    threads = max(1, min(torch.get_num_threads(), len(x)))
    _library().visrep_short_conv(ctypes.byref(conv), int("dx" in results), threads, build.parallel())


def _library() -> ctypes.CDLL:
    library = build.load(SOURCE)
    library.visrep_short_conv.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    library.visrep_short_conv.restype = None
    return library
