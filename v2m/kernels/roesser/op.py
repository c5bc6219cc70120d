"""The public scan by Roesser's model: arguments checked, a backend chosen, one opaque operator for torch's own tools.

``v2m::roesser`` is what torch.compile and FlopCounterMode see; the backend ``reference`` stays plain PyTorch, so it
can be traced and differentiated twice. V2M (arXiv 2410.10382) starts from this model and simplifies it to a row pass
and a column pass (``v2m.kernels.scan2d``). Which neighbour feeds which state is what the authors' figure draws
(motivation.png of github.com/wangck20/V2M); that the step sizes, B, C and the couplings are the token's choice, as in
Mamba, and that the couplings have rank one, is this code's reading.
"""

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from v2m.kernels.roesser import reference, wavefront
from v2m.kernels.roesser.reference import MATRICES, NAMES

BACKENDS = ("auto", "reference", "wavefront")
FLOPS_PER_STATE = 2 * 9 + 2 * 2  # two recurrences, and for each of two couplings an inner product and an update


def roesser_scan(
    x: Tensor,
    delta1: Tensor,
    delta2: Tensor,
    A1: Tensor,
    A4: Tensor,
    p2: Tensor | None = None,
    q2: Tensor | None = None,
    p3: Tensor | None = None,
    q3: Tensor | None = None,
    B1: Tensor | None = None,
    B2: Tensor | None = None,
    C1: Tensor | None = None,
    C2: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scan a grid from its top left corner by Roesser's model, a state along rows coupled to one along columns.

        h1[i,j] = exp(delta1 A1) h1[i,j-1] + delta1 (p2 <q2, h2[i,j-1]> + B1 x[i,j])
        h2[i,j] = exp(delta2 A4) h2[i-1,j] + delta2 (p3 <q3, h1[i-1,j]> + B2 x[i,j])
        y[i,j]  = <C1, h1[i,j]> + <C2, h2[i,j]>

    h1 reads both states of the left neighbour, h2 both of the upper one. Everything on the right that has no index is
    that of token (i, j); h1 and h2, of N numbers for every channel, are zero outside the grid.

    x, delta1, delta2: (batch, D, H, W), the step sizes positive already. A1, A4: (D, N), negative for a stable scan.
    Each of the other eight: None for the constant 1, fixed (D, N), or variable (batch, N, H, W); zeros take a term
    out. For another corner the caller flips inputs and result. Types: float16, bfloat16, float32 or float64; all is
    computed in the widest of the inputs' types, float32 at least.

    Returns y (batch, D, H, W) in x's dtype. ``backend``: "reference", token by token, differentiable any number of
    times; "wavefront", by anti-diagonals, differentiable once; "auto" is the latter.
    Raises ValueError for shapes, types and names that do not fit.
    """
    arguments = (x, delta1, delta2, A1, A4, p2, q2, p3, q3, B1, B2, C1, C2)
    inputs = dict(zip(NAMES, arguments, strict=True))
    _check(inputs)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    types = (t.dtype for t in arguments if t is not None)
    dtype = functools.reduce(torch.promote_types, types, torch.float32)
    inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
    if backend == "reference":
        return reference.scan(inputs).to(x.dtype)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    y, _ = _roesser(*inputs.values(), keep)
    return y.to(x.dtype)


def _check(inputs: dict[str, Tensor | None]) -> None:
    """Raise ValueError, naming the argument, unless the arguments fit each other."""
    x, A1 = inputs["x"], inputs["A1"]
    if x.dim() != 4 or A1.dim() != 2 or len(A1) != x.shape[1]:
        raise ValueError(f"x is (batch, D, H, W) and A1 (D, N), got {_shape(x)} and {_shape(A1)}")
    if not x.numel() or not A1.numel():
        raise ValueError(f"nothing may be empty, got x {_shape(x)} and A1 {_shape(A1)}")
    for name, like in (("delta1", "x"), ("delta2", "x"), ("A4", "A1")):
        if inputs[name].shape != inputs[like].shape:
            raise ValueError(f"{name} has the shape of {like}, {_shape(inputs[like])}, got {_shape(inputs[name])}")
    variable = (len(x), A1.shape[1], *x.shape[2:])
    for name in MATRICES:
        tensor = inputs[name]
        if tensor is not None and tensor.shape not in (A1.shape, variable):
            raise ValueError(f"{name} is None, {_shape(A1)} or {variable}, got {_shape(tensor)}")
    present = {name: t for name, t in inputs.items() if t is not None}
    for name, tensor in present.items():
        if not tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(
                f"all arguments are real and on the device of x, {x.device}, got {name} of {tensor.dtype} "
                f"on {tensor.device}"
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


@torch.library.custom_op("v2m::roesser", mutates_args=())
def _roesser(
    x: Tensor,
    delta1: Tensor,
    delta2: Tensor,
    A1: Tensor,
    A4: Tensor,
    p2: Tensor | None,
    q2: Tensor | None,
    p3: Tensor | None,
    q3: Tensor | None,
    B1: Tensor | None,
    B2: Tensor | None,
    C1: Tensor | None,
    C2: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y and what the backward needs beside the inputs."""
    arguments = (x, delta1, delta2, A1, A4, p2, q2, p3, q3, B1, B2, C1, C2)
    # Autocast would reach the products inside; the types here are the caller's choice.
    with torch.autocast(x.device.type, enabled=False):
        return wavefront.forward(dict(zip(NAMES, arguments, strict=True)), keep)


@_roesser.register_fake
def _(x, delta1, delta2, A1, *rest):
    return _grid(x), A1.new_empty(wavefront.saved_shape(x, A1) if rest[-1] else (0,))


@torch.library.custom_op("v2m::roesser_backward", mutates_args=())
def _roesser_backward(
    dy: Tensor,
    x: Tensor,
    delta1: Tensor,
    delta2: Tensor,
    A1: Tensor,
    A4: Tensor,
    p2: Tensor | None,
    q2: Tensor | None,
    p3: Tensor | None,
    q3: Tensor | None,
    B1: Tensor | None,
    B2: Tensor | None,
    C1: Tensor | None,
    C2: Tensor | None,
    saved: Tensor,
) -> list[Tensor]:
    """Gradients to all inputs in their order; empty where the argument is None."""
    arguments = (x, delta1, delta2, A1, A4, p2, q2, p3, q3, B1, B2, C1, C2)
    with torch.autocast(x.device.type, enabled=False):
        gradients = wavefront.backward(dy, dict(zip(NAMES, arguments, strict=True)), saved)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_roesser_backward.register_fake
def _(dy, x, *rest):
    *arguments, _ = (x, *rest)
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) if t.dim() == 2 else _grid(t) for t in arguments]


def _grid(like: Tensor) -> Tensor:
    """Return memory for (batch, C, H, W), channels last."""
    batch, channels, height, columns = like.shape
    return like.new_empty(batch, height, columns, channels).permute(0, 3, 1, 2)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1] if keep else None)


def _backward(ctx, dy, _):
    *tensors, saved = ctx.saved_tensors
    if dy is None:
        return (None,) * (len(NAMES) + 1)
    gradients = _roesser_backward(dy, *tensors, saved)
    return *(None if t is None else g for t, g in zip(tensors, gradients, strict=True)), None


_roesser.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.v2m.roesser)
def _flops(x_shape, delta1_shape, delta2_shape, A1_shape, *args, **kwargs) -> int:
    """Count as the field counts a scan: 9 for a state of each recurrence, a multiply-add of a coupling as 1.

    For every batch element, channel, token and state 2 x 9 for h1 and h2, and 2 x 2 for the couplings <q, h> and
    p times that.
    """
    batch, width, height, columns = x_shape
    return FLOPS_PER_STATE * batch * width * height * columns * A1_shape[1]


@register_flop_formula(torch.ops.v2m.roesser_backward)
def _flops_backward(dy_shape, *shapes, **kwargs) -> int:
    return 2 * _flops(*shapes)  # as torch counts its own operators' backward
