"""The selective scan on the CPU in C++ (cpu.cpp), called through ctypes: the backend's arguments and memory."""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from .. import build

SOURCE = Path(__file__).with_name("cpu.cpp")
STEPS = 32  # between saved states, as in ../tiles.h
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MAX_VECTORS = 8  # of a block of channels: more share the lane sums of dB and dC, fewer make more tasks
ENOUGH_TASKS = 16


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int64), ("stride", ctypes.c_int64 * 5)]


NUMBERS = ("batch", "width", "length", "state", "segments", "blocks", "groups_B", "groups_C", "softplus")
INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "bias")
RESULTS = ("y", "last", "saved", "dy", "dlast", "du", "ddelta", "dz", "rows", "parts_B", "parts_C")


class _Scan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("reverse", ctypes.c_char_p),
        *((name, _Tensor) for name in (*INPUTS, *RESULTS)),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    ]


def unavailable() -> str:
    """Return why this backend cannot run here, or an empty text; compiles on first use."""
    try:
        build.load(SOURCE)
    except build.BuildError as error:
        return str(error)
    return ""


def saved_shape(u: Tensor, A: Tensor, *_) -> tuple[int, ...]:
    """Return the shape of the states before every tile of steps."""
    batch, width, length = u.shape
    return (batch, -(-length // STEPS), A.shape[1], width)


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, reverse: tuple[bool, ...], keep: bool):
    """Return y (batch, width, L), the last state (batch, width, N) and, if ``keep``, what backward needs.

    Raises ValueError for types that the kernel does not take.
    """
    batch, width, length = u.shape
    state = A.shape[1]
    y, last = torch.empty_like(u), A.new_empty(batch, width, state)
    saved = A.new_empty(saved_shape(u, A) if keep else (0,))
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    call.run("forward", y=y, last=last, saved=saved if keep else None)
    return y, last, saved


def backward(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus: bool, reverse):
    """Return the gradients to u, delta, A, B, C, D, z and delta_bias, None where the argument is None.

    Bitwise the same whatever the number of threads: what tasks share is added here, in a fixed order.
    """
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    batch, width, length = u.shape
    state = A.shape[1]
    fixed = [matrix.dim() == 2 for matrix in (B, C)]
    rows = A.new_empty(batch, state * (1 + sum(fixed)) + 2, width)
    parts = [None if f else A.new_empty(batch * call.tasks, state, length) for f in fixed]
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(u), None if z is None else torch.empty_like(u)
    results = {"saved": saved, "dy": dy, "dlast": dlast, "du": du, "ddelta": ddelta, "dz": dz, "rows": rows}
    call.run("backward", **results, parts_B=parts[0], parts_C=parts[1])
    total = iter(_ordered_sum(rows, 0).split([state] * (1 + sum(fixed)) + [1, 1]))
    dA = torch.empty_like(A).copy_(next(total).t())  # in A's own memory order
    matrices = []
    for matrix, part in zip((B, C), parts, strict=True):
        if part is not None:
            part = part.view(batch, matrix.shape[1], -1, state, length)
        gradient = next(total).t() if part is None else _ordered_sum(part, 2)
        matrices.append(torch.empty_like(matrix).copy_(gradient))
    dD, dbias = (None if t is None else row[0].clone() for t, row in zip((D, delta_bias), total, strict=True))
    return du, ddelta, dA, *matrices, dD, dz, dbias


def _ordered_sum(parts: Tensor, axis: int) -> Tensor:
    """Add the slices of an axis one after the other, into the first: torch's sum may split it among threads."""
    first, *others = parts.unbind(axis)
    for other in others:
        first += other
    return first


class _Call:
    """One scan's inputs and how its channels are split into tasks."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, reverse: tuple[bool, ...]):
        self.library = _library()
        self.inputs = dict(zip(INPUTS, (u, delta, A, B, C, D, z, delta_bias), strict=True))
        self.double = A.dtype == torch.float64
        batch, width, length = u.shape
        groups = [0 if matrix.dim() == 2 else matrix.shape[1] for matrix in (B, C)]
        segments = math.lcm(len(reverse), *(g or 1 for g in groups))
        directions = bytes(reverse[s * len(reverse) // segments] for s in range(segments))
        lanes = self.library.visrep_scan_vector_bytes() // (8 if self.double else 4)
        blocks = _blocks(-(-(width // segments) // lanes), batch * segments)
        numbers = (batch, width, length, A.shape[1], segments, blocks, *groups, int(delta_softplus))
        self.tasks = segments * blocks  # of one batch element
        self.scan = _Scan(**dict(zip(NUMBERS, numbers, strict=True)), reverse=directions)

    def run(self, direction: str, **results: Tensor | None) -> None:
        """Run forward or backward on the memory given."""
        scan = self.scan
        types = {torch.float64} if self.double else {torch.float32, torch.bfloat16, torch.float16}
        for name, tensor in (*self.inputs.items(), *results.items()):
            if tensor is not None:
                if tensor.device.type != "cpu" or tensor.dtype not in types:
                    raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, which does not go with A")
                strides = (ctypes.c_int64 * 5)(*tensor.stride())
                setattr(scan, name, _Tensor(tensor.data_ptr(), TYPES[tensor.dtype], strides))
        threads = max(1, min(torch.get_num_threads(), scan.batch * self.tasks))
        scan.scratch_bytes = self.library.visrep_scan_scratch_bytes(ctypes.byref(scan), int(direction == "backward"))
        scratch = torch.empty(threads * scan.scratch_bytes, dtype=torch.uint8)
        scan.scratch = scratch.data_ptr()
        kernel = getattr(self.library, f"visrep_scan_{direction}")
        kernel(ctypes.byref(scan), threads, build.parallel())


def _blocks(vectors: int, tasks: int) -> int:
    """Return into how many blocks the vectors of a segment are split, ``tasks`` segments being there."""
    size = MAX_VECTORS
    while size > 1 and tasks * -(-vectors // size) < ENOUGH_TASKS:
        size //= 2
    size = -(-vectors // -(-vectors // size))  # even shares
    return -(-vectors // size)


def _library() -> ctypes.CDLL:
    try:
        library = build.load(SOURCE)
    except build.BuildError as error:
        raise RuntimeError(f"the scan's backend 'cpu' cannot run here: {error}") from error
    library.visrep_scan_scratch_bytes.restype = ctypes.c_int64
    for direction in ("forward", "backward"):
        kernel = getattr(library, f"visrep_scan_{direction}")
        kernel.argtypes, kernel.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p), None
    return library
