"""Roesser's model: by diagonals against token by token, the passes that it contains, its quadrant, bad input."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from v2m.kernels.roesser import op, roesser_scan, wavefront
from v2m.kernels.roesser.reference import MATRICES
from v2m.kernels.scan2d import scan2d
from v2m.tests.golden_files import relative_error

EXACT = 1e-10  # float64 against float64: only the order of sums differs
PASSES = 1e-9  # the same, against another kernel
# The result is rounded once to its type (half a unit in the last place is 2^-9), float32 sums drift a little.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
BACKENDS = ("reference", "wavefront")
SIDES = (1, 2, 3, 5)
KINDS = ("variable", "fixed", None)
# Of the eight matrices: all of one kind, and every one of each kind among others.
BROADCASTS = [(kind,) * 8 for kind in KINDS] + [tuple(KINDS[(k + shift) % 3] for k in range(8)) for shift in range(3)]


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def make(height, columns, kinds=("variable",) * 8, batch=2, width=3, state=4, dtype=torch.float64) -> dict:
    """Return the tensors of ``roesser_scan`` by name, with couplings small enough for sums of order one."""
    draws = torch.Generator().manual_seed(10 * height + columns)

    def draw(*size):
        return torch.randn(*size, generator=draws, dtype=torch.float64)

    grid, fixed = (batch, width, height, columns), (width, state)
    arguments = {"x": draw(*grid), "delta1": 0.2 * draw(*grid).exp(), "delta2": 0.2 * draw(*grid).exp()}
    arguments |= {"A1": -draw(*fixed).exp(), "A4": -draw(*fixed).exp()}
    for name, kind in zip(MATRICES, kinds, strict=True):
        sizes = {"variable": (batch, state, height, columns), "fixed": fixed, None: ()}
        arguments[name] = draw(*sizes[kind]) / 2 if kind else None
    return {name: None if t is None else t.to(dtype) for name, t in arguments.items()}


def run(arguments: dict, backend: str) -> dict[str, torch.Tensor]:
    """Return y and the gradient to every argument for a fixed gradient to y."""
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in arguments.items()}
    y = roesser_scan(**leaves, backend=backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {k: t.grad for k, t in leaves.items() if t is not None}


def assert_same(got: dict, expected: dict, bound: float) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        # On a grid of one row or column nothing is coupled one way: gradients that are zero must be that exactly.
        error = relative_error(got[name], value) if value.any() else float(got[name].abs().max())
        assert error <= bound, f"{name}: relative error {error:.2e}"


def nested_loops(arguments: dict) -> torch.Tensor:
    """Return y by Python's own numbers, from one sentence: h1 comes from both states of the left neighbour and from x,
    h2 from both states of the upper neighbour and from x."""
    lists = {name: None if t is None else t.tolist() for name, t in arguments.items()}
    states = arguments["A1"].shape[1]

    def here(name, b, c, i, j) -> list[float]:
        if lists[name] is None:
            return [1.0] * states
        if arguments[name].dim() == 2:
            return lists[name][c]
        return [lists[name][b][n][i][j] for n in range(states)]

    y = torch.empty_like(arguments["x"])
    batch, width, height, columns = y.shape
    for b, c in itertools.product(range(batch), range(width)):
        h1, h2, outside = {}, {}, [0.0] * states
        for i, j in itertools.product(range(height), range(columns)):
            p2, q2, p3, q3, B1, B2, C1, C2 = (here(name, b, c, i, j) for name in MATRICES)
            x, delta1, delta2 = (lists[name][b][c][i][j] for name in ("x", "delta1", "delta2"))
            A1, A4 = lists["A1"][c], lists["A4"][c]
            left1, left2 = (h.get((i, j - 1), outside) for h in (h1, h2))
            upper1, upper2 = (h.get((i - 1, j), outside) for h in (h1, h2))
            from_left = sum(q2[n] * left2[n] for n in range(states))
            from_above = sum(q3[n] * upper1[n] for n in range(states))
            h1[i, j] = [
                math.exp(delta1 * A1[n]) * left1[n] + delta1 * (p2[n] * from_left + B1[n] * x) for n in range(states)
            ]
            h2[i, j] = [
                math.exp(delta2 * A4[n]) * upper2[n] + delta2 * (p3[n] * from_above + B2[n] * x) for n in range(states)
            ]
            y[b, c, i, j] = sum(C1[n] * h1[i, j][n] + C2[n] * h2[i, j][n] for n in range(states))
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", BROADCASTS)
@pytest.mark.parametrize(("height", "columns"), [(1, 1), (1, 6), (6, 1), (2, 2), (3, 5), (5, 3), (4, 11)])
def test_each_state_reads_both_states_of_its_own_neighbour_and_the_token(height, columns, kinds, backend, poisoned):
    arguments = make(height, columns, kinds)
    assert relative_error(roesser_scan(**arguments, backend=backend), nested_loops(arguments)) < EXACT


@pytest.mark.parametrize("below", [True, False])
def test_two_tokens_by_hand(below):
    """N = 1, the second token under the first or to its right."""

    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64)

    x, delta1, delta2 = tensor(2, 3), tensor(0.5, 0.25), tensor(0.1, 0.2)
    A1, A4, p2, q2, p3, q3, B1, B2, C1, C2 = tensor(-1, -2, 0.3, 0.7, 1.1, 0.9, 4, 5, 6, 7)
    h1, h2 = delta1[0] * B1 * x[0], delta2[0] * B2 * x[0]
    first = C1 * h1 + C2 * h2
    if below:
        h2 = torch.exp(delta2[1] * A4) * h2 + delta2[1] * (p3 * q3 * h1 + B2 * x[1])
        h1 = delta1[1] * B1 * x[1]
    else:
        h1 = torch.exp(delta1[1] * A1) * h1 + delta1[1] * (p2 * q2 * h2 + B1 * x[1])
        h2 = delta2[1] * B2 * x[1]
    grids = (t.view(1, 1, 2, 1) if below else t.view(1, 1, 1, 2) for t in (x, delta1, delta2))
    matrices = (t.view(1, 1) for t in (A1, A4, p2, q2, p3, q3, B1, B2, C1, C2))
    y = roesser_scan(*grids, *matrices, backend="reference")
    torch.testing.assert_close(y.flatten(), torch.stack([first, C1 * h1 + C2 * h2]), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("height", "columns"), list(itertools.product(SIDES, SIDES)))
def test_diagonals_give_the_outputs_and_gradients_of_the_definition(height, columns, poisoned):
    arguments = make(height, columns)
    assert_same(run(arguments, "wavefront"), run(arguments, "reference"), EXACT)


@pytest.mark.parametrize("kinds", BROADCASTS)
@pytest.mark.parametrize(("height", "columns"), [(1, 20), (20, 1), (7, 13), (12, 6)])
def test_several_chunks_of_diagonals_and_every_kind_of_matrix_match_the_definition(height, columns, kinds, poisoned):
    assert height + columns - 1 > 2 * wavefront.DIAGONALS
    arguments = make(height, columns, kinds)
    assert_same(run(arguments, "wavefront"), run(arguments, "reference"), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", [("variable",) * 8, ("fixed",) * 8, (None,) * 8])
def test_gradients_are_those_of_finite_differences(kinds, backend):
    arguments = make(2, 3, kinds, batch=1, width=2, state=2)
    leaves = [None if t is None else t.requires_grad_() for t in arguments.values()]
    assert torch.autograd.gradcheck(lambda *given: roesser_scan(*given, backend=backend), leaves)


@pytest.mark.parametrize("kinds", [("variable",) * 8, BROADCASTS[-1]])
def test_second_derivatives_of_the_definition_are_those_of_finite_differences(kinds):
    arguments = make(2, 2, kinds, batch=1, width=1, state=2)
    leaves = [None if t is None else t.requires_grad_() for t in arguments.values()]
    assert torch.autograd.gradgradcheck(lambda *given: roesser_scan(*given, backend="reference"), leaves)


def row_pass(x, arguments) -> torch.Tensor:
    """Scan (batch, D, H, W) along rows with delta1, A1, B1 and C1."""
    delta, B, C = (None if arguments[n] is None else arguments[n][:, None] for n in ("delta1", "B1", "C1"))
    A = arguments["A1"][None]
    return scan2d(x[:, None], delta, A, B, C, directions=("right",), backend="reference")[:, 0]


def column_pass(x, arguments) -> torch.Tensor:
    """Scan (batch, D, H, W) along columns with delta2, A4, B2 and C2."""
    delta, B, C = (None if arguments[n] is None else arguments[n][:, None] for n in ("delta2", "B2", "C2"))
    A = arguments["A4"][None]
    return scan2d(x[:, None], delta, A, B, C, directions=("down",), backend="reference")[:, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "columns"), [(1, 5), (5, 1), (3, 5), (9, 4)])
def test_without_way_back_the_columns_take_the_row_pass_of_the_token_above(height, columns, backend):
    arguments = make(height, columns)
    nothing = torch.zeros_like(arguments["A1"])
    one_way = {"p2": nothing, "q2": None, "B2": nothing, "C1": nothing, "p3": None, "q3": None}
    y = roesser_scan(**arguments | one_way, backend=backend)
    rows = row_pass(arguments["x"], arguments | {"C1": None})
    above = torch.cat([torch.zeros_like(rows[:, :, :1]), rows[:, :, :-1]], 2)
    expected = column_pass(above, arguments | {"B2": None})
    assert_same({"y": y}, {"y": expected}, PASSES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", list(itertools.product(("p2", "q2"), ("p3", "q3"))))
@pytest.mark.parametrize(("height", "columns"), [(1, 1), (1, 6), (6, 1), (4, 6), (9, 4)])
def test_without_couplings_it_is_the_sum_of_a_row_pass_and_a_column_pass(height, columns, without, backend):
    arguments = make(height, columns)
    nothing = torch.zeros_like(arguments["A1"])
    y = roesser_scan(**arguments | dict.fromkeys(without, nothing), backend=backend)
    expected = row_pass(arguments["x"], arguments) + column_pass(arguments["x"], arguments)
    assert relative_error(y, expected) < PASSES


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", BROADCASTS)
def test_on_the_transposed_grid_with_its_halves_exchanged_it_gives_the_transposed_output(kinds, backend):
    arguments = make(4, 7, kinds)
    halves = (("delta1", "delta2"), ("A1", "A4"), ("p2", "p3"), ("q2", "q3"), ("B1", "B2"), ("C1", "C2"))
    exchanged = {"x": "x"} | dict(halves) | {other: name for name, other in halves}
    turned = {
        name: t.transpose(2, 3) if t is not None and t.dim() == 4 else t
        for name, t in ((name, arguments[other]) for name, other in exchanged.items())
    }
    y = roesser_scan(**turned, backend=backend)
    assert relative_error(y.transpose(2, 3), roesser_scan(**arguments, backend=backend)) < EXACT


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_is_reached_by_all_of_its_quadrant_and_by_nothing_outside(backend):
    height, columns, i, j = 5, 6, 3, 2
    arguments = make(height, columns)
    names = ("x", "delta1", "delta2", *MATRICES)
    leaves = {k: t.requires_grad_(k in names) for k, t in arguments.items()}
    y = roesser_scan(**leaves, backend=backend)
    gradients = torch.autograd.grad(y[:, :, i, j].sum(), [leaves[name] for name in names])
    inside = torch.zeros(height, columns, dtype=torch.bool)
    inside[: i + 1, : j + 1] = True
    for name, gradient in zip(names, gradients, strict=True):
        assert (gradient[..., ~inside] == 0).all(), name
    assert (gradients[0][..., inside] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("half", "other", "coupling"), [("C1", "C2", "p2"), ("C2", "C1", "p3")])
def test_a_half_is_reached_by_what_reached_its_own_neighbour_and_by_its_own_line_alone_without_coupling(
    half, other, coupling, backend
):
    """x[i-1,j-1] reaches both halves; x[i-1,j] reaches h1 by no way, and h2 by its column; x[i,j-1] the other way."""
    i, j = 3, 2
    arguments = make(5, 6)
    nothing = torch.zeros_like(arguments["A1"])
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
    rows_first = half == "C1"
    neighbour = (rows <= i) & (columns < j) if rows_first else (rows < i) & (columns <= j)
    line = (rows == i) & (columns < j) if rows_first else (rows < i) & (columns == j)
    token = (rows == i) & (columns == j)
    for changes, expected in (({}, neighbour | token), ({coupling: nothing}, line | token)):
        x = arguments["x"].clone().requires_grad_()
        y = roesser_scan(**arguments | {"x": x, other: nothing} | changes, backend=backend)
        (gradient,) = torch.autograd.grad(y[0, 0, i, j], x)
        assert torch.equal(gradient[0, 0] != 0, expected)
        assert not gradient[1:].any() and not gradient[:, 1:].any()  # nothing crosses images or channels


def test_inputs_of_any_strides_give_the_same():
    arguments = make(4, 7)
    expected = run(arguments, "reference")
    for order in ((3, 2, 1, 0), (0, 2, 3, 1), (1, 3, 0, 2)):
        places = [order.index(axis) for axis in range(4)]
        other = {
            k: t.permute(order).contiguous().permute(places) if t.dim() == 4 else t.mT.contiguous().mT
            for k, t in arguments.items()
        }
        assert_same(run(other, "wavefront"), expected, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ERROR)
def test_every_type_is_rounded_once(dtype, backend):
    arguments = make(7, 9, dtype=dtype)
    y = roesser_scan(**arguments, backend=backend)
    assert y.dtype == dtype
    exact = roesser_scan(**{name: t.double() for name, t in arguments.items()}, backend="reference")
    assert relative_error(y, exact) < ERROR[dtype]


def test_backward_is_bitwise_repeatable():
    arguments = make(9, 9, width=40, state=16, dtype=torch.float32)
    first, again = (run(arguments, "wavefront") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_flops_follow_the_counting_rule():
    arguments = {name: t.to("meta") for name, t in make(3, 5).items()}
    with FlopCounterMode(display=False) as counter:
        assert roesser_scan(**arguments).shape == (2, 3, 3, 5)
    assert counter.get_total_flops() == (18 + 4) * 2 * 3 * 3 * 5 * 4


def test_the_operator_fulfils_torchs_contract():
    kinds = ("variable", "variable", "fixed", None, "variable", "fixed", None, "variable")
    arguments = make(3, 7, kinds, dtype=torch.float32)
    tensors = [None if t is None else t.requires_grad_() for t in arguments.values()]
    torch.library.opcheck(op._roesser, (*tensors, True))


def test_compiled_by_torch_it_gives_the_same():
    arguments = make(3, 4, dtype=torch.float32)

    def function():
        return roesser_scan(**arguments)

    torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(), function())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x is"),
        ({"A1": torch.zeros(4, 4)}, "x is"),
        ({"delta1": torch.zeros(2, 3, 5, 4)}, "delta1 has"),
        ({"delta2": torch.zeros(2, 1, 4, 5)}, "delta2 has"),
        ({"A4": torch.zeros(3, 5)}, "A4 has"),
        ({"q2": torch.zeros(4)}, "q2 is"),
        ({"B1": torch.zeros(2, 4, 5, 4)}, "B1 is"),
        ({"C2": torch.zeros(4, 3)}, "C2 is"),
        ({"p3": torch.zeros(3, 4, dtype=torch.int64)}, "p3 of torch.int64"),
        ({"B2": torch.zeros(3, 4, device="meta")}, "B2 of torch.float32 on meta"),
        ({"x": torch.zeros(2, 3, 0, 5)}, "empty"),
        ({"backend": "chunked"}, "backend 'chunked' is unknown"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        roesser_scan(**make(4, 5, dtype=torch.float32) | change)


class MadeStates(TorchDispatchMode):
    """Counts the tensors (token, batch, D, N) that operators make in new memory."""

    def __init__(self, states: int):
        super().__init__()
        self.states, self.count = states, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = [t for t in tree_leaves([arguments, options]) if isinstance(t, torch.Tensor)]
        result = function(*arguments, **options)
        if isinstance(result, torch.Tensor) and result.dim() == 4 and result.shape[-1] == self.states:
            known = {t.untyped_storage().data_ptr() for t in given}
            self.count += result.untyped_storage().data_ptr() not in known
        return result


def test_the_forward_makes_nothing_of_the_size_of_its_states_but_the_two_decays():
    kinds = ("fixed", "fixed", "fixed", "fixed", "variable", "fixed", "fixed", "variable")  # the mixer's
    inputs = make(3, 5, kinds, state=7)
    with MadeStates(7) as made:
        y, _ = wavefront.forward(inputs, keep=False)
    # The places and the two variable matrices, channels last, once; two for every diagonal.
    assert made.count == 1 + 2 + 2 * (3 + 5 - 1)
    assert relative_error(y, nested_loops(inputs)) <= EXACT
