"""The short convolution of a grid on the CPU in C++ (cpu.cpp), called through ctypes."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import build
from .reference import DIRECTIONS

KERNELS = (2, 3, 4)  # taps
TAKEN = "float32 or float64 on the CPU, 2 to 4 taps"
SOURCE = Path(__file__).with_name("cpu.cpp")
CODES = tuple(DIRECTIONS)
NUMBERS = ("batch", "sources", "groups", "height", "width", "channels", "kernel", "is_double")
POINTERS = ("x", "weight", "bias", "out", "dout", "dx", "rows")


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("x_stride", ctypes.c_int64 * 4),
        ("out_stride", ctypes.c_int64 * 4),
        ("dout_stride", ctypes.c_int64 * 4),
        ("directions", ctypes.c_char_p),
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


def empty_groups(x: Tensor, groups: int, side_by_side: bool) -> Tensor:
    """(B, S, H, W, D) -> (B, K, H, W, D), dense in that order or, side by side, as (B, H, W, K, D)."""
    batch, _, height, width, channels = x.shape
    if side_by_side:
        return x.new_empty(batch, height, width, groups, channels).movedim(3, 1)
    return x.new_empty(batch, groups, height, width, channels)


def forward(x: Tensor, weight: Tensor, bias: Tensor, directions: tuple[str, ...], side_by_side: bool = False) -> Tensor:
    """(B, S, H, W, D), (K, D, T), (K, D) -> (B, K, H, W, D)."""
    out = empty_groups(x, len(directions), side_by_side)
    _run(x, weight, bias, directions, out=out)
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, directions: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to x, weight and bias, bitwise the same whatever the number of threads."""
    groups, width, kernel = weight.shape
    dx, rows = x.new_empty(x.shape), x.new_empty(len(x), groups, kernel + 1, width)
    _run(x, weight, bias, directions, dout=dout, dx=dx, rows=rows)
    total, *others = rows.unbind(0)
    for other in others:
        total += other
    return dx, total[:, :kernel].transpose(1, 2).contiguous(), total[:, kernel].contiguous()


def _run(x, weight, bias, directions, dout: Tensor | None = None, **results: Tensor) -> None:
    if not takes(x, weight, bias) or (dout is not None and dout.dtype != x.dtype):
        raise ValueError(f"the compiled form takes {TAKEN}, all tensors alike")
    # Channels are read as vectors; the other axes may lie anyhow.
    x, dout = (t if t is None or t.stride(4) == 1 else t.contiguous() for t in (x, dout))
    groups, width, kernel = weight.shape
    numbers = (*x.shape[:2], groups, *x.shape[2:4], width, kernel, int(x.dtype == torch.float64))
    kept = {"x": x, "weight": weight.transpose(1, 2).contiguous(), "bias": bias.contiguous(), "dout": dout}
    pointers = {name: t.data_ptr() for name, t in (kept | results).items() if t is not None}
    conv = _Conv(
        **dict(zip(NUMBERS, numbers, strict=True)),
        x_stride=x.stride()[:4],
        out_stride=results["out"].stride()[:4] if "out" in results else (0,) * 4,
        dout_stride=(0,) * 4 if dout is None else dout.stride()[:4],
        directions=bytes(CODES.index(name) for name in directions),
        **pointers,
    )
    threads = max(1, torch.get_num_threads())
    _library().visrep_short_conv(ctypes.byref(conv), int("dx" in results), threads, build.parallel())


def _library() -> ctypes.CDLL:
    library = build.load(SOURCE)
    library.visrep_short_conv.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    library.visrep_short_conv.restype = None
    return library
