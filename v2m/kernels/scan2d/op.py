"""The public scan of a grid: arguments checked, a backend chosen, one opaque operator for torch's own tools.

``v2m::scan2d`` is what torch.compile, torch.export and FlopCounterMode see; the backend ``reference`` stays plain
PyTorch, so it can be traced, exported to ONNX and differentiated twice.
"""

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from v2m.kernels.scan2d import reference

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "chunked", "cpu", "triton", "mamba_ssm")
NAMES = tuple(reference.DIRECTIONS)
MAX_STATE = 64
FLOPS_PER_STATE = 9  # the field's count for one step of one state: discretise, update, read


def scan2d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    directions: Sequence[str],
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scan a grid along its rows or columns, for K groups at once, each in a direction of its own.

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = <C_t, h_t>``; every row (column) begins with h = 0. This
    is one pass of V2M's two-dimensional recurrence (arXiv 2410.10382): rows with C constant, then columns with B
    constant. A sequence of length L is a grid of 1 x L. The skip D u and the gate are modules outside.

    u, delta: (batch, K, D, H, W), in any memory order; K may be expanded, so that all groups read one input. A:
    (K, D, N), delta_bias (K, D). B, C: None for the constant 1, fixed (K, D, N), or variable (batch, K, N, H, W). N is
    1 to 64. Types: float16, bfloat16, float32 or float64; the state, A and delta are float32 whatever the rest is,
    float64 where u is. ``delta_softplus`` takes softplus(delta + delta_bias). ``directions``: K names, "right" or
    "left" along W, "down" or "up" along H.

    Returns y (batch, K, D, H, W) in u's dtype, channels last in memory. ``backend="auto"`` takes the fastest one for
    u's device; a name forces one, RuntimeError where it cannot run here. Raises ValueError for shapes, types and
    names that do not fit. Forward-mode, double and functorch's derivatives are the reference's alone.
    """
    directions = tuple(directions)
    _check(u, delta, A, B, C, delta_bias, directions)
    double = any(t.dtype == torch.float64 for t in (u, delta, B, C) if t is not None)
    kept = torch.float64 if double else torch.float32
    A, delta_bias = (None if t is None else t.to(kept) for t in (A, delta_bias))
    name = _resolve(backend, u.device.type)
    if name in ("reference", "mamba_ssm"):
        return _module(name).scan(u, delta, A, B, C, delta_bias, delta_softplus, directions)
    # Inputs of several types are computed in the widest, never rounded to u's.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (u, delta, B, C) if t is not None))
    x, delta, B, C = (None if t is None else t.to(dtype) for t in (u, delta, B, C))
    inputs = (x, delta, A, B, C, delta_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    codes = [NAMES.index(name) for name in directions]
    y, _ = _scan(*inputs, delta_softplus, codes, name, keep)
    return y.to(u.dtype)


def _check(u, delta, A, B, C, delta_bias, directions: tuple[str, ...]) -> None:
    """Raise ValueError, naming the argument, unless the arguments fit each other."""
    if u.dim() != 5 or A.dim() != 3 or A.shape[:2] != u.shape[1:3]:
        raise ValueError(f"u is (batch, K, D, H, W) and A (K, D, N), got {_shape(u)} and {_shape(A)}")
    batch, groups, width, *grid = u.shape
    state = A.shape[2]
    if not u.numel() or not 1 <= state <= MAX_STATE:
        raise ValueError(f"nothing may be empty and N is 1 to {MAX_STATE}, got u {_shape(u)}, A {_shape(A)}")
    if delta.shape != u.shape:
        raise ValueError(f"delta has the shape of u, {_shape(u)}, got {_shape(delta)}")
    if delta_bias is not None and delta_bias.shape != (groups, width):
        raise ValueError(f"delta_bias is ({groups}, {width}), got {_shape(delta_bias)}")
    if len(directions) != groups or any(name not in NAMES for name in directions):
        raise ValueError(f"directions are {groups} of {', '.join(NAMES)}, one for each group, got {directions}")
    variable = (batch, groups, state, *grid)
    for name, tensor in (("B", B), ("C", C)):
        if tensor is not None and tensor.shape not in (A.shape, variable):
            raise ValueError(f"{name} is None, {_shape(A)} or {variable}, got {_shape(tensor)}")
    present = [t for t in (u, delta, A, B, C, delta_bias) if t is not None]
    if not all(t.is_floating_point() for t in present) or len({t.device for t in present}) != 1:
        kinds = ", ".join(f"{t.dtype} on {t.device}" for t in present)
        raise ValueError(f"all arguments are real and on one device, got {kinds}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"v2m.kernels.scan2d.{backend}")


@functools.cache
def _unavailable(backend: str) -> str:
    return _module(backend).unavailable()


@functools.cache
def _automatic(device: str) -> str:
    """Return the fastest backend for a type of device; says once why a slower one has to do."""
    fastest = {"cuda": "triton", "cpu": "cpu"}.get(device)
    if fastest is None:
        return "chunked"
    reason = _unavailable(fastest)
    if reason:
        log.warning("the scan falls back to its slower backend 'chunked': %s", reason)
        return "chunked"
    return fastest


@torch.compiler.assume_constant_result  # asks once what this machine has; nothing of it is traced
def _resolve(backend: str, device: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        # Tensors without data are traced, never computed: any operator stands for the one that will run.
        return "chunked" if device == "meta" else _automatic(device)
    reason = _unavailable(backend)
    if reason:
        raise RuntimeError(f"the scan's backend {backend!r} cannot run here: {reason}")
    return backend


def empty_grid(like: Tensor) -> Tensor:
    """Return memory for (batch, K, D, H, W), channels last, of ``like``'s shape, dtype and device."""
    batch, groups, width, height, columns = like.shape
    return like.new_empty(batch, groups, height, columns, width).permute(0, 1, 4, 2, 3)


@torch.library.custom_op("v2m::scan2d", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    directions: list[int],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y and what the backward needs beside the inputs."""
    names = tuple(NAMES[code] for code in directions)
    # Autocast would reach the products inside; the types here are the caller's choice.
    with torch.autocast(u.device.type, enabled=False):
        return _module(backend).forward(u, delta, A, B, C, delta_bias, delta_softplus, names, keep)


@_scan.register_fake
def _(u, delta, A, B, C, delta_bias, delta_softplus, directions, backend, keep):
    names = tuple(NAMES[code] for code in directions)
    saved = _module(backend).saved_shape(u, A, B, C, names) if keep else (0,)
    return empty_grid(u), A.new_empty(saved)


@torch.library.custom_op("v2m::scan2d_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    directions: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to u, delta, A, B, C, delta_bias; empty where the argument is None."""
    names = tuple(NAMES[code] for code in directions)
    with torch.autocast(u.device.type, enabled=False):
        gradients = _module(backend).backward(dy, u, delta, A, B, C, delta_bias, saved, delta_softplus, names)
    return tuple(A.new_empty(0) if g is None else g for g in gradients)


@_scan_backward.register_fake
def _(dy, u, delta, A, B, C, delta_bias, saved, delta_softplus, directions, backend):
    rest = (A.new_empty(0) if t is None else t.new_empty(t.shape) for t in (A, B, C, delta_bias))
    return empty_grid(u), empty_grid(u), *rest


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.directions, ctx.backend, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1] if keep else None)


def _backward(ctx, dy, _):
    *tensors, saved = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    gradients = _scan_backward(dy, *tensors, saved, ctx.delta_softplus, ctx.directions, ctx.backend)
    optional = [None if t is None else g for t, g in zip(tensors, gradients, strict=True)]
    return *optional, None, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.v2m.scan2d)
def _flops(u_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    batch, groups, width, height, columns = u_shape
    return FLOPS_PER_STATE * batch * groups * width * height * columns * A_shape[2]


@register_flop_formula(torch.ops.v2m.scan2d_backward)
def _flops_backward(dy_shape, u_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    return 2 * _flops(u_shape, delta_shape, A_shape)  # as torch counts its own operators' backward
