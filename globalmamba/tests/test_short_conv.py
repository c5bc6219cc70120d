"""The short convolution: both forms against its definition, gradients, threads, bad input."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from globalmamba.kernels.short_conv import cpu, short_conv

# float64 sums of a handful of terms, in gradients of a few dozen, in another order
EXACT = 1e-12
# float32: the same sums, and an exponential of relative error 2e-7
SINGLE = 2e-6

needs_compiler = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "runs here")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_compiler)]
# batch, length, width, directions, taps: shorter than the taps, narrower and wider than a vector, whole vectors
SHAPES = [(2, 1, 3, 2, 4), (1, 2, 16, 2, 4), (3, 9, 33, 1, 4), (2, 20, 40, 2, 3), (2, 5, 64, 2, 2)]


def arguments(batch, length, width, directions, taps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, width), (directions, width, taps), (directions, width))
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def by_definition(x, weight, bias):
    results = []
    for direction, (taps, offset) in enumerate(zip(weight, bias, strict=True)):
        row = (x.flip(1) if direction else x).mT
        row = F.conv1d(F.pad(row, (taps.shape[1] - 1, 0)), taps[:, None], offset, groups=x.shape[2]).mT
        results.append(row.flip(1) if direction else row)
    return F.silu(torch.cat(results, 2))


def with_gradients(function, leaves):
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def worst(found, expected) -> float:
    return max(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_definition(backend, shape):
    for dtype, bar in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        leaves = arguments(*shape, dtype)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = with_gradients(by_definition, exact)
        assert worst(with_gradients(lambda *a: short_conv(*a, backend=backend), leaves), expected) < bar


@pytest.mark.slow
@needs_compiler
def test_compiled_form_passes_gradcheck_and_torchs_own_checks_of_an_operator():
    leaves = arguments(2, 5, 3, 2, 4)
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, backend="cpu"), leaves)
    torch.library.opcheck(torch.ops.globalmamba.short_conv.default, tuple(leaves))


@needs_compiler
def test_compiled_form_takes_any_strides_and_large_numbers():
    x, weight, bias = (leaf.detach() for leaf in arguments(2, 7, 20, 2, 4))
    strided = x.mT.contiguous().mT.requires_grad_()
    dense = x.clone().requires_grad_()
    for dy in (torch.ones(1, dtype=torch.float64).expand(2, 7, 40), torch.randn(2, 40, 7).double().mT):
        gradients = []
        for leaf in (strided, dense):
            y = short_conv(leaf, weight, bias, backend="cpu")
            gradients.append(torch.autograd.grad(y, leaf, dy if leaf is strided else dy.contiguous())[0])
        assert torch.equal(*gradients)
    huge = short_conv(x.float() * 1e30, weight.float(), bias.float(), backend="cpu")
    assert worst([huge], [by_definition(x * 1e30, weight, bias)]) < SINGLE


@needs_compiler
def test_two_threads_give_the_bits_of_one():
    leaves, threads = arguments(5, 11, 33, 2, 4, torch.float32), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(with_gradients(lambda *a: short_conv(*a, backend="cpu"), leaves))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_flops_are_two_for_a_tap_of_a_step():
    x, weight, bias = (torch.empty(leaf.shape, device="meta") for leaf in arguments(2, 9, 8, 2, 4))
    with FlopCounterMode(display=False) as counter:
        assert short_conv(x, weight, bias).shape == (2, 9, 16)
    assert counter.get_total_flops() == 2 * 2 * 9 * 16 * 4


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_shapes_that_do_not_fit_are_refused(name):
    leaves = dict(zip(("x", "weight", "bias"), arguments(2, 5, 3, 2, 4), strict=True))
    leaves[name] = leaves[name][:, :2]
    with pytest.raises(ValueError, match="x, weight and bias are"):
        short_conv(**leaves)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend 'triton' is unknown"):
        short_conv(*arguments(2, 5, 3, 2, 4), backend="triton")


@needs_compiler
def test_what_the_compiled_form_does_not_take_is_refused_and_auto_computes_it_all_the_same():
    x, weight, bias = (t.detach() for t in arguments(2, 6, 8, 1, 4, torch.float32))
    five = torch.randn(1, 8, 5)
    for given in ((x.half(), weight, bias), (x.bfloat16(), weight, bias), (x, five, bias)):
        with pytest.raises(ValueError, match="the compiled form takes"):
            short_conv(*given, backend="cpu")
        expected = by_definition(*(t.double() for t in given))
        assert float((short_conv(*given).double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gate_of_a_very_negative_number_is_nothing(backend):
    x = torch.tensor([-1e38, -200.0, 100.0]).view(1, 1, 3)
    y = short_conv(x, torch.ones(1, 3, 2), torch.zeros(1, 3), backend=backend)
    assert y.flatten().tolist() == [0.0, 0.0, 100.0]
