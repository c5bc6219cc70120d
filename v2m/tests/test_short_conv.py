"""The short convolution: both forms against its definition, gradients, groups, strides, threads, bad input."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..kernels.short_conv import cpu, short_conv
from ..kernels.short_conv.op import PAPER
from .golden_files import relative_error

# float64 sums of a handful of terms, in gradients of a few dozen, in another order
EXACT = 1e-12
# float32: the same sums, and an exponential of relative error 2e-7
SINGLE = 2e-6
ALL = ("right", "left", "down", "up")

needs_compiler = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "runs here")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_compiler)]
# x (batch, sources, height, columns, width), directions, taps: sides shorter than the taps, a sequence, a column,
# narrower and wider than a vector, wider than a task, several groups of one source, all directions
CASES = [
    ((2, 1, 1, 1, 3), ("right", "left"), 4),
    ((3, 1, 1, 9, 33), ("left",), 4),
    ((1, 1, 9, 1, 16), ("down", "up"), 4),
    ((2, 1, 4, 7, 40), ALL, 3),
    ((2, 2, 5, 3, 20), ("down", "up", "up", "left"), 4),
    ((1, 1, 2, 3, 150), ("right", "down", "right"), 2),
]


def arguments(shape, groups, taps, dtype=torch.float64):
    draws = torch.Generator().manual_seed(0)
    sizes = (shape, (groups, shape[4], taps), (groups, shape[4]))
    return [torch.randn(s, generator=draws, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def by_definition(x, weight, bias, directions):
    """Every line alone, turned so that the direction is forward, through a causal conv1d."""
    share = len(directions) // x.shape[1]
    results = []
    for k, direction in enumerate(directions):
        grid = x[:, k // share]
        grid = grid.transpose(1, 2) if direction in ("down", "up") else grid
        grid = grid.flip(2) if direction in ("left", "up") else grid
        lines = F.pad(grid.flatten(0, 1).mT, (weight.shape[2] - 1, 0))
        lines = F.conv1d(lines, weight[k][:, None], bias[k], groups=x.shape[4])
        grid = lines.mT.unflatten(0, grid.shape[:2])
        grid = grid.flip(2) if direction in ("left", "up") else grid
        results.append(grid.transpose(1, 2) if direction in ("down", "up") else grid)
    return F.silu(torch.stack(results, 1))


def with_gradients(function, leaves):
    y = function(*leaves)
    draws = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=draws, dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_same(values, expected, bound) -> None:
    for name, value, other in zip(("y", "x", "weight", "bias"), values, expected, strict=True):
        assert relative_error(value.double(), other) < bound, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "directions", "taps"), CASES)
def test_output_and_gradients_are_those_of_the_definition(backend, shape, directions, taps):
    for dtype, bound in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        leaves = arguments(shape, len(directions), taps, dtype)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = with_gradients(lambda *a: by_definition(*a, directions), exact)
        values = with_gradients(lambda *a: short_conv(*a, directions, backend), leaves)
        assert_same(values, expected, bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_taps_weigh_the_token_itself_and_those_before_it_by_hand(backend):
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 1, 2, 3, 1)  # rows 1 2 3 and 4 5 6
    weight = torch.tensor([10.0, 1.0], dtype=torch.float64).expand(4, 1, 2)
    y = short_conv(x, weight, torch.zeros(4, 1, dtype=torch.float64), ALL, backend)
    sums = [[1, 12, 23, 4, 45, 56], [21, 32, 3, 54, 65, 6], [1, 2, 3, 14, 25, 36], [41, 52, 63, 4, 5, 6]]
    torch.testing.assert_close(y.flatten(2)[0], F.silu(torch.tensor(sums, dtype=torch.float64)))


@needs_compiler
def test_compiled_form_passes_gradcheck_and_torchs_own_checks_of_an_operator():
    leaves = arguments((2, 2, 2, 3, 3), 4, 4)
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, ALL, "cpu"), leaves)
    operator = getattr(torch.ops, PAPER).short_conv.default
    for side_by_side in (False, True):
        torch.library.opcheck(operator, (*leaves, [0, 3, 2, 1], side_by_side))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_side_by_side_are_the_same_numbers_and_one_axis_of_channels(backend):
    leaves = arguments((2, 1, 3, 4, 5), 4, 4)
    apart = with_gradients(lambda *a: short_conv(*a, ALL, backend), leaves)
    beside = with_gradients(lambda *a: short_conv(*a, ALL, backend, side_by_side=True), leaves)
    assert_same(beside, apart, EXACT)
    y = short_conv(*leaves, ALL, backend, side_by_side=True)
    assert y.movedim(1, 3).is_contiguous() and y.movedim(1, 3).flatten(3).data_ptr() == y.data_ptr()


@needs_compiler
def test_compiled_form_takes_large_numbers():
    x, weight, bias = (leaf.detach() for leaf in arguments((2, 1, 3, 4, 20), 4, 4))
    huge = short_conv(x.float() * 1e30, weight.float(), bias.float(), ALL, "cpu")
    assert relative_error(huge.double(), by_definition(x * 1e30, weight, bias, ALL)) < SINGLE


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_and_output_gradient_of_any_strides_give_the_same(backend):
    x, weight, bias = (leaf.detach() for leaf in arguments((2, 2, 3, 5, 20), 4, 4))
    draws = torch.Generator().manual_seed(2)
    dy = torch.randn(2, 4, 3, 5, 20, generator=draws, dtype=torch.float64)
    wide = torch.zeros(2, 3, 5, 2, 31, dtype=torch.float64)[..., 7:27].permute(0, 3, 1, 2, 4)
    others = (
        wide.copy_(x),  # cut out of wider rows, sources next to each other
        x.mT.contiguous().mT,  # channels not dense
        x.transpose(2, 3).contiguous().transpose(2, 3),
    )
    expected = strided_run(x, weight, bias, dy, backend)
    for other in others:
        gradient = dy.transpose(2, 3).contiguous().transpose(2, 3)
        values = strided_run(other, weight, bias, gradient, backend)
        for value, exact in zip(values, expected, strict=True):
            assert relative_error(value, exact) < EXACT
    constant = torch.ones(1, dtype=torch.float64).expand(dy.shape)
    expanded, dense = (strided_run(x, weight, bias, d, backend) for d in (constant, constant.contiguous()))
    assert all(relative_error(a, b) < EXACT for a, b in zip(expanded, dense, strict=True))


def strided_run(x, weight, bias, dy, backend):
    leaves = [x.detach().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    assert leaves[0].stride() == x.stride()
    y = short_conv(*leaves, ALL, backend)
    assert y.is_contiguous()
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_weight_and_one_source_expanded_for_all_groups_gather_every_groups_gradient(backend):
    x, weight, bias = arguments((2, 1, 3, 4, 5), 1, 4)

    def expanded(x, weight, bias):
        shared = x.expand(-1, 2, -1, -1, -1)
        return short_conv(shared, weight.expand(4, -1, -1), bias.expand(4, -1), ALL, backend)

    def repeated(x, weight, bias):
        return by_definition(x.repeat(1, 2, 1, 1, 1), weight.repeat(4, 1, 1), bias.repeat(4, 1), ALL)

    leaves = [x, weight, bias]
    assert_same(with_gradients(expanded, leaves), with_gradients(repeated, leaves), EXACT)


@needs_compiler
def test_two_threads_give_the_bits_of_one():
    leaves, threads = arguments((5, 2, 3, 4, 150), 4, 4, torch.float32), torch.get_num_threads()
    runs = []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            runs.append(with_gradients(lambda *a: short_conv(*a, ALL, "cpu"), leaves))
    finally:
        torch.set_num_threads(threads)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_flops_are_two_for_a_tap_of_a_token():
    shapes = [leaf.shape for leaf in arguments((2, 2, 3, 5, 8), 4, 4)]
    x, weight, bias = (torch.empty(shape, device="meta") for shape in shapes)
    with FlopCounterMode(display=False) as counter:
        assert short_conv(x, weight, bias, ALL).shape == (2, 4, 3, 5, 8)
    assert counter.get_total_flops() == 2 * 4 * 2 * 3 * 5 * 8 * 4


def test_compiled_by_torch_it_gives_the_same():
    leaves = arguments((2, 1, 3, 4, 5), 4, 4, torch.float32)

    def function(*leaves):
        return short_conv(*leaves, ALL)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, leaves), with_gradients(function, leaves))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 5, 3)}, "x, weight and bias are"),
        ({"x": torch.zeros(2, 1, 4, 5, 2)}, "x, weight and bias are"),
        ({"weight": torch.zeros(4, 2, 4)}, "x, weight and bias are"),
        ({"bias": torch.zeros(3)}, "x, weight and bias are"),
        ({"x": torch.zeros(2, 3, 4, 5, 3)}, "cannot share 3 sources"),
        ({"x": torch.zeros(2, 1, 0, 5, 3)}, "empty"),
        ({"directions": ("right", "left")}, "directions are 4"),
        ({"directions": ("right", "left", "down", "sideways")}, "sideways"),
        ({"backend": "triton"}, "backend 'triton' is unknown"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, words):
    fitting = dict(zip(("x", "weight", "bias"), arguments((2, 1, 4, 5, 3), 4, 4), strict=True))
    with pytest.raises(ValueError, match=words):
        short_conv(**{**fitting, "directions": ALL, **change})


@needs_compiler
def test_what_the_compiled_form_does_not_take_is_refused_and_auto_computes_it_all_the_same():
    x, weight, bias = (t.detach() for t in arguments((2, 1, 3, 4, 8), 4, 4, torch.float32))
    five = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(3))
    for inputs in ((x.half(), weight, bias), (x.bfloat16(), weight, bias), (x, five, bias)):
        with pytest.raises(ValueError, match="the compiled form takes"):
            short_conv(*inputs, ALL, "cpu")
        y, expected = short_conv(*inputs, ALL), by_definition(*(t.double() for t in inputs), ALL)
        # the weights too are rounded to the type of x
        assert y.dtype == inputs[0].dtype and relative_error(y.double(), expected) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gate_of_a_very_negative_number_is_nothing(backend):
    x = torch.tensor([-1e38, -200.0, 100.0]).view(1, 1, 1, 1, 3)
    y = short_conv(x, torch.ones(1, 3, 2), torch.zeros(1, 3), ("up",), backend)
    assert y.flatten().tolist() == [0.0, 0.0, 100.0]
