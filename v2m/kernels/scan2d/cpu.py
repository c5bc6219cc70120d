"""The scan of a grid on the CPU in C++ (cpu.cpp), called through ctypes: the backend's arguments and memory.

The groups of one axis are one call: ``lined`` shows a tensor's rows or columns as sequences through its strides, so
columns are read and written where they are.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from v2m.kernels import build
from v2m.kernels.scan2d.op import empty_grid
from v2m.kernels.scan2d.reference import by_axis

SOURCE = Path(__file__).with_name("cpu.cpp")
STEPS = 32  # between saved states, as in ../tiles.h
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MAX_VECTORS = 8  # of a block of channels: more share the lane sums of dB and dC, fewer make more tasks
ENOUGH_TASKS = 16


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int64), ("stride", ctypes.c_int64 * 5)]


NUMBERS = ("batch", "groups", "width", "lines", "length", "state", "blocks", "kind_B", "kind_C", "softplus")
INPUTS = ("u", "delta", "A", "B", "C", "bias")
RESULTS = ("y", "saved", "dy", "du", "ddelta", "rows", "parts_B", "parts_C")


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


def saved_shape(u: Tensor, A: Tensor, B, C, directions: tuple[str, ...]) -> tuple[int]:
    """Return the shape of the states before the second and every later tile of steps, flat, axis after axis."""
    return (sum(_saved_numbers(u, A, axis, groups) for axis, groups, _ in _calls(directions)),)


def _calls(directions: tuple[str, ...]) -> list[tuple[int, list[int], list[bool]]]:
    """Return ``by_axis``, its groups at even distances, as strides reach them; one by one where they are not."""
    calls = []
    for axis, groups, back in by_axis(directions):
        gaps = {after - before for before, after in zip(groups, groups[1:], strict=False)}
        if len(gaps) > 1:
            calls += [(axis, [group], [is_back]) for group, is_back in zip(groups, back, strict=True)]
        else:
            calls.append((axis, groups, back))
    return calls


def _saved_numbers(u: Tensor, A: Tensor, axis: int, groups: list[int]) -> int:
    steps = u.shape[axis]
    lines = u.shape[3] * u.shape[4] // steps
    return (-(-steps // STEPS) - 1) * len(u) * len(groups) * lines * A.shape[1] * A.shape[2]


def forward(u, delta, A, B, C, delta_bias, delta_softplus: bool, directions: tuple[str, ...], keep: bool):
    """Return y (batch, K, D, H, W) and, if ``keep``, what backward needs.

    Raises ValueError for types that the kernel does not take.
    """
    y = empty_grid(u)
    saved = A.new_empty(saved_shape(u, A, B, C, directions) if keep else (0,))
    place = 0
    for axis, groups, back in _calls(directions):
        call = _Call(u, delta, A, B, C, delta_bias, delta_softplus, axis, groups, back)
        size = _saved_numbers(u, A, axis, groups) if keep else 0
        call.run("forward", y=call.lined(y), saved=saved[place : place + size] if size else None)
        place += size
    return y, saved


def backward(dy, u, delta, A, B, C, delta_bias, saved, delta_softplus: bool, directions: tuple[str, ...]):
    """Return the gradients to u, delta, A, B, C and delta_bias, None where the argument is None.

    Bitwise the same whatever the number of threads: what tasks share is added here, in a fixed order.
    """
    du, ddelta = empty_grid(u), empty_grid(u)
    dA, dB, dC, dbias = (None if t is None else t.new_empty(t.shape) for t in (A, B, C, delta_bias))
    place = 0
    for axis, groups, back in _calls(directions):
        call = _Call(u, delta, A, B, C, delta_bias, delta_softplus, axis, groups, back)
        size = _saved_numbers(u, A, axis, groups)
        part = saved[place : place + size] if size else None
        place += size
        call.backward(dy, part, du, ddelta, dA, dB, dC, dbias)
    return du, ddelta, dA, dB, dC, dbias


def _ordered_sum(parts: Tensor, axis: int) -> Tensor:
    """Add the slices of an axis one after the other, into the first: torch's sum may split it among threads."""
    first, *others = parts.unbind(axis)
    for other in others:
        first += other
    return first


class _Call:
    """The scan of the groups of one axis, and how its channels are split into tasks."""

    def __init__(self, u, delta, A, B, C, delta_bias, delta_softplus: bool, axis: int, groups: list[int], back):
        self.library = _library()
        self.axis, self.groups = axis, groups
        self.double = A.dtype == torch.float64
        self.inputs = {
            name: None if t is None else self.lined(t) if t.dim() == 5 else self._of_groups(t, 0)
            for name, t in zip(INPUTS, (u, delta, A, B, C, delta_bias), strict=True)
        }
        batch, _, width, lines, length = self.inputs["u"].shape
        lanes = self.library.visrep_scan2d_vector_bytes() // (8 if self.double else 4)
        blocks = _blocks(-(-width // lanes), batch * len(groups))
        kinds = [0 if m is None else 1 if m.dim() == 3 else 2 for m in (B, C)]
        numbers = (batch, len(groups), width, lines, length, A.shape[2], blocks, *kinds, int(delta_softplus))
        self.scan = _Scan(**dict(zip(NUMBERS, numbers, strict=True)), reverse=bytes(back))

    def lined(self, tensor: Tensor) -> Tensor:
        """(batch, K, ., H, W) -> (batch, groups, ., lines, steps), a view of the groups of this call."""
        return self._of_groups(tensor, 1).transpose(self.axis, -1)

    def _of_groups(self, tensor: Tensor, axis: int) -> Tensor:
        """Return the groups of this call as a view."""
        first, last = self.groups[0], self.groups[-1]
        distance = self.groups[1] - first if last > first else 1
        return tensor[(slice(None),) * axis + (slice(first, last + 1, distance),)]

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
        tasks = scan.batch * scan.groups * scan.blocks
        threads = max(1, min(torch.get_num_threads(), tasks))
        scan.scratch_bytes = self.library.visrep_scan2d_scratch_bytes(ctypes.byref(scan), int(direction == "backward"))
        scratch = torch.empty(threads * scan.scratch_bytes, dtype=torch.uint8)
        scan.scratch = scratch.data_ptr()
        kernel = getattr(self.library, f"visrep_scan2d_{direction}")
        kernel(ctypes.byref(scan), threads, build.parallel())

    def backward(self, dy, saved, du, ddelta, dA, dB, dC, dbias) -> None:
        """Write the gradients of this call's groups into their places."""
        scan, A = self.scan, self.inputs["A"]
        state = scan.state
        fixed = [kind == 1 for kind in (scan.kind_B, scan.kind_C)]
        rows = A.new_empty(scan.batch, scan.groups, state * (1 + sum(fixed)) + 1, scan.width)
        shape = (scan.batch * scan.groups * scan.blocks, state, scan.lines, scan.length)
        parts = [A.new_empty(shape) if kind == 2 else None for kind in (scan.kind_B, scan.kind_C)]
        gradients = {"du": self.lined(du), "ddelta": self.lined(ddelta), "rows": rows}
        self.run("backward", dy=self.lined(dy), saved=saved, **gradients, parts_B=parts[0], parts_C=parts[1])
        total = iter(_ordered_sum(rows, 0).split([state] * (1 + sum(fixed)) + [1], 1))
        self._of_groups(dA, 0).copy_(next(total).transpose(1, 2))
        for target, is_fixed, part in zip((dB, dC), fixed, parts, strict=True):
            if is_fixed:
                self._of_groups(target, 0).copy_(next(total).transpose(1, 2))
            elif part is not None:
                part = part.view(scan.batch, scan.groups, scan.blocks, *shape[1:])
                self.lined(target).copy_(_ordered_sum(part, 2))
        if dbias is not None:
            self._of_groups(dbias, 0).copy_(next(total)[:, 0])


def _blocks(vectors: int, tasks: int) -> int:
    """Return into how many blocks the vectors of a group are split, ``tasks`` groups and images being there."""
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
    library.visrep_scan2d_scratch_bytes.restype = ctypes.c_int64
    for direction in ("forward", "backward"):
        kernel = getattr(library, f"visrep_scan2d_{direction}")
        kernel.argtypes, kernel.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p), None
    return library
