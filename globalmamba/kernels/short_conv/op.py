"""The public short convolution: arguments checked, a backend chosen, one opaque operator for torch's own tools.

``globalmamba::short_conv`` is what torch.compile and FlopCounterMode see of the compiled form; everywhere else it
is plain PyTorch (reference.py).
"""

import functools
import logging

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from globalmamba.kernels.short_conv import cpu, reference

log = logging.getLogger(__name__)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """Convolve every channel with its own few taps along the sequence, then SiLU; causal, and in both directions.

    x: (B, L, D). weight: (R, D, K), bias: (R, D) with R directions: 1 is forward only, the second sees what is
    behind a token, mirrored, tap for tap. Returns (B, L, R D), the forward direction first. ``backend``: auto,
    reference or cpu; auto is the compiled one where it can run. Raises ValueError for shapes that do not fit.
    """
    fits = x.dim() == weight.dim() == 3 and bias.shape == weight.shape[:2] and weight.shape[0] in (1, 2)
    if not fits or x.shape[2] != weight.shape[1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(
            f"x, weight and bias are (B, L, D), (R, D, K) and (R, D) with R 1 or 2, got {shapes}"
        )
    if backend not in ("auto", "reference", "cpu"):
        raise ValueError(f"backend {backend!r} is unknown: choose auto, reference or cpu")
    if not x.numel():
        raise ValueError(f"nothing may be empty, got x {tuple(x.shape)}")
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)  # under autocast x alone is in half precision
    traced = x.device.type == "meta"  # never computed; the operator counts its own FLOPs exactly
    if backend == "cpu" and not traced and not cpu.takes(x, weight, bias):
        raise ValueError(
            f"the compiled form takes {cpu.TAKEN}, got {x.dtype} on {x.device}, {weight.shape[2]} taps"
        )
    if backend == "auto":
        backend = "cpu" if traced or (cpu.takes(x, weight, bias) and _available()) else "reference"
    return (_conv if backend == "cpu" else reference.forward)(x, weight, bias)


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


@torch.library.custom_op("globalmamba::short_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cpu.forward(x, weight, bias)


@torch.library.custom_op("globalmamba::short_conv_backward", mutates_args=())
def _conv_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.backward(dout, x, weight, bias)


@_conv.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:2], bias.numel())


@_conv_backward.register_fake
def _(dout, x, weight, bias):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return _conv_backward(dout, *ctx.saved_tensors)


_conv.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.globalmamba.short_conv)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    directions, width, kernel = weight_shape
    return 2 * x_shape[0] * x_shape[1] * directions * width * kernel


@register_flop_formula(torch.ops.globalmamba.short_conv_backward)
def _flops_backward(dout_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * _flops(x_shape, weight_shape)
