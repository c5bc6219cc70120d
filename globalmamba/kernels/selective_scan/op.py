"""The public selective scan: arguments checked, a backend chosen, one opaque operator for torch's own tools.

Same meaning and shapes as ``selective_scan_fn`` of mamba-ssm (github.com/state-spaces/mamba), plus a direction
per group of channels. torch.compile, torch.export and FlopCounterMode see ``globalmamba::selective_scan``;
the backend ``reference`` stays plain PyTorch, so it can be traced, exported to ONNX and differentiated twice.
"""

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from globalmamba.kernels.selective_scan import reference

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "chunked", "cpu", "triton", "mamba_ssm")
MAX_STATE = 64
FLOPS_PER_STATE = 9  # the field's count for one step of one state: discretise, update, read


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
    reverse: bool | Sequence[bool] = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = <C_t, h_t> + D u_t``, gated by silu(z).

    u, delta, z: (batch, width, L) in any memory order, float16, bfloat16, float32 or float64. A: (width, N),
    D and delta_bias: (width,). B, C: fixed (width, N), variable (batch, N, L), or grouped (batch, G, N, L),
    where channel d reads group d // (width / G). N is 1 to 64. The state, A and delta are float32 whatever
    the rest is, float64 where u is. ``delta_softplus`` takes softplus(delta + delta_bias).

    ``reverse`` is one direction for all channels or one for each of R equal groups of channels (G is then a
    multiple of R): a reversed group runs from the last step to the first and keeps its outputs in their
    places, so both directions of a bidirectional mixer are one call with twice the channels.

    Returns y (batch, width, L) in u's dtype and memory order and, if asked, the last state (batch, width, N).
    ``backend="auto"`` takes the fastest one for u's device; a name forces one, RuntimeError where it cannot
    run here. Raises ValueError for shapes and types that do not fit.
    Forward-mode, double and functorch's derivatives are the reference's alone.
    """
    directions = tuple(bool(r) for r in reverse) if hasattr(reverse, "__len__") else (bool(reverse),)
    B, C = _grouped(B), _grouped(C)
    _check(u, delta, A, B, C, D, z, delta_bias, directions)
    double = any(t.dtype == torch.float64 for t in (u, delta, B, C, z) if t is not None)
    kept = torch.float64 if double else torch.float32
    A, D, delta_bias = (None if t is None else t.to(kept) for t in (A, D, delta_bias))
    name = _resolve(backend, u.device.type)
    if name == "reference":
        y, last = reference.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions)
    elif name == "mamba_ssm":
        peer = _module(name)
        y, last = peer.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, directions)
    else:
        # Inputs of several types are computed in the widest, never rounded to u's.
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in (u, delta, B, C, z) if t is not None))
        x, delta, B, C, z = (None if t is None else t.to(dtype) for t in (u, delta, B, C, z))
        keep = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (u, delta, A, B, C, D, z, delta_bias)
        )
        y, last, _ = _scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, list(directions), name, keep)
        y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def _grouped(matrix: Tensor) -> Tensor:
    return matrix.unsqueeze(1) if matrix.dim() == 3 else matrix


def _check(u, delta, A, B, C, D, z, delta_bias, directions: tuple[bool, ...]) -> None:
    """Raise ValueError, naming the argument, unless the normalised arguments fit each other."""
    if u.dim() != 3 or A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(f"u is (batch, width, L) and A (width, N), got {_shape(u)} and {_shape(A)}")
    batch, width, length = u.shape
    state = A.shape[1]
    if min(batch, width, length) < 1 or not 1 <= state <= MAX_STATE:
        raise ValueError(f"nothing may be empty and N is 1 to {MAX_STATE}, got u {_shape(u)}, A {_shape(A)}")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(f"{name} has the shape of u, {_shape(u)}, got {_shape(tensor)}")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (width,):
            raise ValueError(f"{name} is ({width},), got {_shape(tensor)}")
    if not directions or width % len(directions):
        raise ValueError(f"{len(directions)} directions do not share {width} channels evenly")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() == 2:
            fits = tensor.shape == (width, state)
        else:
            fits = tensor.dim() == 4 and tensor.shape == (batch, tensor.shape[1], state, length)
            fits = (
                fits and tensor.shape[1] > 0 and width % tensor.shape[1] == 0 and tensor.shape[1] % len(directions) == 0
            )
        if not fits:
            raise ValueError(
                f"{name} is ({width}, {state}), ({batch}, {state}, {length}) or ({batch}, G, {state}, {length}) "
                f"with G a divisor of {width} and a multiple of the {len(directions)} directions, got {_shape(tensor)}"
            )
    tensors = [t for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]
    if any(not t.dtype.is_floating_point for t in tensors):
        raise ValueError("the scan takes real floating-point tensors")
    if any(t.device != u.device for t in tensors):
        raise ValueError("all tensors of a scan are on one device")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


@functools.cache
def _unavailable(name: str) -> str:
    return _module(name).unavailable()


@functools.cache
def _automatic(device: str) -> str:
    """Return the backend for a device: the fast one where it can run, else ``chunked``, with one log line."""
    fast = {"cuda": "triton", "cpu": "cpu"}.get(device)
    if fast is None:
        return "chunked"
    reason = _unavailable(fast)
    if reason:
        log.warning("the selective scan falls back to its slower form 'chunked': %s", reason)
        return "chunked"
    return fast


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


@torch.library.custom_op("globalmamba::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: list[bool],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and what the backward needs beside the inputs."""
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, tuple(reverse), keep)
    # Autocast would reach the products inside; the types here are the caller's choice.
    with torch.autocast(u.device.type, enabled=False):
        return _module(backend).forward(*arguments)


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, keep):
    batch, width, length = u.shape
    state = A.shape[1]
    saved = _module(backend).saved_shape(u, A, B, C, tuple(reverse)) if keep else (0,)
    return torch.empty_like(u), A.new_empty(batch, width, state), A.new_empty(saved)


@torch.library.custom_op("globalmamba::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    reverse: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to u, delta, A, B, C, D, z, delta_bias; empty where the argument is None."""
    arguments = (dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus, tuple(reverse))
    with torch.autocast(u.device.type, enabled=False):
        gradients = _module(backend).backward(*arguments)
    return tuple(A.new_empty(0) if g is None else g for g in gradients)


@_scan_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus, reverse, backend):
    # Gradients to delta and z come in u's memory order, whatever theirs is.
    likes = (u, u, A, B, C, D, None if z is None else u, delta_bias)
    return tuple(A.new_empty(0) if like is None else torch.empty_like(like) for like in likes)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.backend, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2] if keep else None)


def _backward(ctx, dy, dlast, _):
    *tensors, saved = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 12
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    rest = (ctx.delta_softplus, ctx.reverse, ctx.backend)
    gradients = _scan_backward(dy, dlast, *tensors, saved, *rest)
    optional = [None if t is None else g for t, g in zip(tensors, gradients, strict=True)]
    return *optional, None, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.globalmamba.selective_scan)
def _flops(u_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    batch, width, length = u_shape
    return FLOPS_PER_STATE * batch * length * width * A_shape[1]


@register_flop_formula(torch.ops.globalmamba.selective_scan_backward)
def _flops_backward(dy_shape, dlast_shape, u_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    return 2 * _flops(u_shape, delta_shape, A_shape)  # as torch counts its own operators' backward
