"""The public short convolution of a grid: arguments checked, a backend chosen, one opaque operator for torch's tools.

``<paper>::short_conv`` is what torch.compile and FlopCounterMode see of the compiled form; everywhere else it is plain
PyTorch (reference.py).
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, reference

log = logging.getLogger(__name__)

PAPER = __name__.partition(".")[0]  # the namespace of the operators

NAMES = cpu.CODES


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    directions: Sequence[str],
    backend: str = "auto",
    side_by_side: bool = False,
) -> Tensor:
    """Convolve every channel with its own few taps along rows or columns, then SiLU; K groups at once.

    x: (B, S, H, W, D), S sources; weight: (K, D, T), bias: (K, D). Group k reads source k // (K / S) in the direction
    ``directions[k]``, "right" or "left" along W, "down" or "up" along H: the last tap is the token itself, the one
    before it the token passed just before, zero outside the line. Returns (B, K, H, W, D), dense;
    ``side_by_side``: dense as (B, H, W, K, D), so that the groups' channels can be seen as one axis. ``backend``: auto,
    reference or cpu; auto is the compiled one where it can run. Raises ValueError for arguments that do not fit.
    """
    directions = tuple(directions)
    _check(x, weight, bias, directions)
    if backend not in ("auto", "reference", "cpu"):
        raise ValueError(f"backend {backend!r} is unknown: choose auto, reference or cpu")
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)  # under autocast x alone is in half precision
    traced = x.device.type == "meta"  # never computed; the operator counts its own FLOPs exactly
    if backend == "cpu" and not traced and not cpu.takes(x, weight, bias):
        raise ValueError(f"the compiled form takes {cpu.TAKEN}, got {x.dtype} on {x.device}, {weight.shape[2]} taps")
    if backend == "auto":
        backend = "cpu" if traced or (cpu.takes(x, weight, bias) and _available()) else "reference"
    if backend == "reference":
        return reference.forward(x, weight, bias, directions, side_by_side)
    return _conv(x, weight, bias, [NAMES.index(name) for name in directions], side_by_side)


def _check(x: Tensor, weight: Tensor, bias: Tensor, directions: tuple[str, ...]) -> None:
    """Raise ValueError, naming the arguments, unless they fit each other."""
    fits = x.dim() == 5 and weight.dim() == 3 and bias.shape == weight.shape[:2]
    if not fits or x.shape[4] != weight.shape[1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(f"x, weight and bias are (B, S, H, W, D), (K, D, T) and (K, D), got {shapes}")
    groups = weight.shape[0]
    if len(directions) != groups or any(name not in NAMES for name in directions):
        raise ValueError(f"directions are {groups} of {', '.join(NAMES)}, one for each group, got {directions}")
    if not x.numel():
        raise ValueError(f"nothing may be empty, got x {tuple(x.shape)}")
    if groups % x.shape[1]:
        raise ValueError(f"the {groups} groups cannot share {x.shape[1]} sources evenly")


@torch.compiler.assume_constant_result  # asks once what this machine has; nothing of it is traced
def _available() -> bool:
    return not _reason()


@functools.cache
def _reason() -> str:
    """Return why the compiled form cannot run here, logged once, or an empty text."""
    reason = cpu.unavailable()
    if reason:
        log.warning("the short convolution falls back to its slower form 'reference': %s", reason)
    return reason


def _names(codes: list[int]) -> tuple[str, ...]:
    return tuple(NAMES[code] for code in codes)


@torch.library.custom_op(f"{PAPER}::short_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, directions: list[int], side_by_side: bool = False) -> Tensor:
    return cpu.forward(x, weight, bias, _names(directions), side_by_side)


@torch.library.custom_op(f"{PAPER}::short_conv_backward", mutates_args=())
def _conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, directions: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.backward(dout, x, weight, bias, _names(directions))


@_conv.register_fake
def _(x, weight, bias, directions, side_by_side=False):
    return cpu.empty_groups(x, len(directions), side_by_side)


@_conv_backward.register_fake
def _(dout, x, weight, bias, directions):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.directions, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    return *_conv_backward(dout, *ctx.saved_tensors, ctx.directions), None, None


_conv.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(getattr(torch.ops, PAPER).short_conv)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    batch, _, height, width, channels = x_shape
    groups, _, kernel = weight_shape
    return 2 * batch * groups * height * width * channels * kernel


@register_flop_formula(getattr(torch.ops, PAPER).short_conv_backward)
def _flops_backward(dout_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * _flops(x_shape, weight_shape)
