"""The scan of a grid: every backend against the definition, and the operator under torch's own tools."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from v2m.kernels.scan2d import composition, op, scan2d
from v2m.tests.golden_files import golden, relative_error

GOLDEN_ERROR = 1e-9  # float64 against float64: only the order of sums differs
# Relative L2 error against the definition in float64 on the same inputs: outputs and gradients are rounded once to
# the type of the inputs (half a unit in the last place is 2^-9 and 2^-12), float32 sums drift a little.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}
SIDES = (1, 2, 7, 14, 28, 31, 56)
ALL = ("right", "left", "down", "up")
KINDS = (None, "fixed", "variable")
HERE = [name for name in ("chunked", "cpu") if not op._unavailable(name)]
NAMES = ("u", "delta", "A", "B", "C", "delta_bias")


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def make(height, width, dtype=torch.float64, kinds=("variable", "variable"), groups=4, channels=6, state=3):
    """Return the tensors of ``scan2d`` by name (None for a constant), in the layout that the mixers use."""
    draws = torch.Generator().manual_seed(100 * height + width)
    kept = torch.promote_types(dtype, torch.float32)

    def draw(*size, into=dtype):
        return torch.randn(*size, generator=draws, dtype=torch.float64).to(into)

    def grid(count):
        return draw(2, groups, height, width, count).permute(0, 1, 4, 2, 3)

    sizes = {"fixed": lambda: draw(groups, channels, state), "variable": lambda: grid(state), None: lambda: None}
    u, delta = grid(channels), grid(channels)
    A = -torch.exp(draw(groups, channels, state, into=kept) / 2)
    B, C = (sizes[kind]() for kind in kinds)
    return dict(zip(NAMES, (u, delta, A, B, C, draw(groups, channels, into=kept)), strict=True))


def run(arguments: dict, directions=ALL, backend="reference", given_in=None) -> dict[str, torch.Tensor]:
    """Return y and the gradient to every argument for a fixed gradient to y, rounded to ``given_in``."""
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in arguments.items()}
    y = scan2d(**leaves, directions=directions, delta_softplus=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(dy.to(given_in or y.dtype).to(y.dtype))
    return {"y": y.detach()} | {k: t.grad for k, t in leaves.items() if t is not None}


def judge(arguments: dict, directions=ALL) -> dict[str, torch.Tensor]:
    """Return what ``run`` returns, by the definition in float64."""
    exact = {k: None if t is None else t.double() for k, t in arguments.items()}
    return run(exact, directions, given_in=arguments["u"].dtype)


def assert_same(got: dict, expected: dict, bound: float) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        error = relative_error(got[name], value)
        assert error <= bound, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["reference", *HERE])
@pytest.mark.parametrize("direction", ALL)
@pytest.mark.parametrize("name", ["fixed_BC_plain", "unit_B", "unit_C", "variable"])
def test_a_grid_of_one_line_reproduces_the_golden_scan_of_a_sequence(name, direction, backend):
    given = golden(f"scan1d_{name}", "in_")
    dy, D, z = (given.pop(key, None) for key in ("dy", "D", "z"))
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in given.items()}
    back, column = direction in ("left", "up"), direction in ("down", "up")

    def as_grid(tensor):
        """(batch, channels, L) -> (batch, 1, channels, H, W), in the order of the scan."""
        line = tensor.flip(-1) if back else tensor
        return line[:, None, :, :, None] if column else line[:, None, :, None]

    def as_matrix(tensor):
        if bool((tensor == 1).all()):
            return None  # the constant that the file calls unit
        return tensor[None] if tensor.dim() == 2 else as_grid(tensor)

    bias = leaves.get("delta_bias")
    y = scan2d(
        as_grid(leaves["u"]),
        as_grid(leaves["delta"]),
        leaves["A"][None],
        as_matrix(leaves["B"]),
        as_matrix(leaves["C"]),
        directions=(direction,),
        delta_bias=None if bias is None else bias[None],
        delta_softplus=True,
        backend=backend,
    )
    y = y[:, 0, ..., 0] if column else y[:, 0, :, 0]
    y = y.flip(-1) if back else y
    y = y if D is None else y + D[:, None] * leaves["u"]
    y = y if z is None else y * torch.nn.functional.silu(z)
    assert relative_error(y, golden(f"scan1d_{name}", "out_")["y"]) < GOLDEN_ERROR
    y.backward(dy)
    expected = golden(f"scan1d_{name}", "grad_")
    for key, leaf in leaves.items():
        if leaf.grad is not None:  # a constant has none
            assert relative_error(leaf.grad, expected[key]) < GOLDEN_ERROR, key


def test_the_definition_step_by_step():
    """Two steps down a column of two, by hand."""
    u, delta = torch.tensor([2.0, 3.0]).view(1, 1, 1, 2, 1), torch.tensor([0.5, 0.25]).view(1, 1, 1, 2, 1)
    A, B, C = torch.full((1, 1, 1), -1.0), torch.full((1, 1, 1), 4.0), torch.full((1, 1, 1), 5.0)
    first = 0.5 * 4 * 2
    second = torch.exp(torch.tensor(-0.25)) * first + 0.25 * 4 * 3
    y = scan2d(u, delta, A, B, C, directions=("down",), backend="reference")
    torch.testing.assert_close(y.flatten(), 5 * torch.stack([torch.tensor(first), second]))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("height", "width"), list(zip(SIDES, SIDES[3:] + SIDES[:3], strict=True)) + [(1, 1), (31, 1)])
def test_every_size_matches_the_definition_forward_and_backward(height, width, backend, poisoned):
    arguments = make(height, width, kinds=("variable", None))
    assert_same(run(arguments, backend=backend), judge(arguments), ERROR[torch.float64])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)))
def test_every_kind_of_B_and_C_matches_the_definition(kinds, backend, poisoned):
    arguments = make(7, 35, kinds=kinds)  # columns of one tile of steps, rows of two
    assert_same(run(arguments, backend=backend), judge(arguments), ERROR[torch.float64])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_is_rounded_once(dtype, backend, poisoned):
    arguments = make(14, 33, dtype, channels=19, state=16)
    assert_same(run(arguments, backend=backend, given_in=dtype), judge(arguments), ERROR[dtype])


@pytest.mark.parametrize("backend", ["reference", *HERE])
@pytest.mark.parametrize(
    "directions",
    [
        ("right",),
        ("up", "up"),
        ("left", "down", "right"),
        ("down", "down", "right", "down"),
        ("up", "left", "up", "up"),
    ],
)
def test_groups_in_any_directions_are_scans_of_their_own(directions, backend):
    arguments = make(5, 6, groups=len(directions))
    got = run(arguments, directions, backend)
    for group, direction in enumerate(directions):
        # Axis 0 of A and the bias, axis 1 of all others, is that of the groups.
        alone = {
            k: t[group : group + 1] if k in ("A", "delta_bias") else t[:, group : group + 1]
            for k, t in arguments.items()
        }
        y = scan2d(**alone, directions=(direction,), delta_softplus=True, backend="reference")
        assert relative_error(got["y"][:, group : group + 1], y) < ERROR[torch.float64]


@pytest.mark.parametrize("backend", ["reference", *HERE])
def test_columns_are_rows_of_the_transposed_grid_and_left_is_right_of_the_mirrored_one(backend):
    arguments = make(4, 9)
    turned = {k: t.transpose(3, 4) if t.dim() == 5 else t for k, t in arguments.items()}
    mirrored = {k: t.flip(4) if t.dim() == 5 else t for k, t in arguments.items()}
    y = scan2d(**arguments, directions=("down", "up") * 2, backend=backend)
    rows = scan2d(**turned, directions=("right", "left") * 2, backend=backend)
    torch.testing.assert_close(y.transpose(3, 4), rows, rtol=1e-12, atol=1e-12)
    y = scan2d(**arguments, directions=("right",) * 4, backend=backend)
    left = scan2d(**mirrored, directions=("left",) * 4, backend=backend)
    torch.testing.assert_close(y.flip(4), left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_inputs_of_any_strides_and_one_input_shared_by_all_groups_give_the_same(backend):
    arguments = make(6, 7)
    arguments["u"] = arguments["u"][:, :1].expand(-1, 4, -1, -1, -1)
    expected = run(arguments, backend="reference")
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)):
        places = [order.index(axis) for axis in range(5)]
        other = dict(arguments)
        for name in ("u", "delta", "B", "C"):
            other[name] = arguments[name].permute(order).contiguous().permute(places)
        assert_same(run(other, backend=backend), expected, ERROR[torch.float64])
    shared = scan2d(**arguments, directions=ALL, delta_softplus=True, backend=backend)
    assert arguments["u"].stride(1) == 0
    assert relative_error(shared, expected["y"]) < ERROR[torch.float64]


@pytest.mark.parametrize("backend", ["reference", *HERE])
@pytest.mark.parametrize("kinds", [("variable", None), (None, "variable"), ("fixed", "fixed")])
def test_gradients_are_those_of_finite_differences(kinds, backend):
    arguments = make(2, 3, kinds=kinds, channels=2, state=2)
    leaves = [None if t is None else t.detach()[:1] if t.dim() == 5 else t.detach() for t in arguments.values()]
    leaves = [None if t is None else t.clone().requires_grad_() for t in leaves]

    def function(u, delta, A, B, C, bias):
        options = {"directions": ALL, "delta_softplus": True, "backend": backend}
        return scan2d(u, delta, A, B, C, delta_bias=bias, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", HERE)
def test_backward_is_bitwise_repeatable(backend):
    arguments = make(14, 40, torch.float32, channels=40, state=16)
    first = run(arguments, backend=backend)
    for _ in range(3):
        again = run(arguments, backend=backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kinds", [("variable", None), (None, "variable"), ("variable", "variable")])
def test_the_composition_that_kernels_are_timed_against_computes_the_same(kinds):
    arguments = make(5, 8, kinds=kinds)
    y = composition.scan(*arguments.values(), True, ALL)
    assert relative_error(y, judge(arguments)["y"]) < ERROR[torch.float64]


def test_flops_follow_the_counting_rule():
    arguments = make(3, 5, torch.float32)
    with FlopCounterMode(display=False) as counter:
        scan2d(**arguments, directions=ALL, backend="chunked")
    assert counter.get_total_flops() == 9 * 2 * 4 * 6 * 3 * 5 * 3


def test_the_operator_fulfils_torchs_contract():
    arguments = make(3, 4, torch.float32, channels=2, state=2)
    tensors = [t.requires_grad_() for t in arguments.values()]
    torch.library.opcheck(op._scan, (*tensors, True, [0, 1, 2, 3], "chunked", True))


def test_compiled_by_torch_it_gives_the_same():
    arguments = make(3, 4, torch.float32, channels=2, state=2)

    def function():
        return scan2d(**arguments, directions=ALL, delta_softplus=True, backend="chunked")

    torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(), function())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": torch.zeros(2, 4, 6, 3)}, "u is"),
        ({"delta": torch.zeros(2, 4, 6, 3, 4)}, "delta has"),
        ({"B": torch.zeros(2, 4, 5, 3, 5)}, "B is"),
        ({"C": torch.zeros(4, 6)}, "C is"),
        ({"delta_bias": torch.zeros(6)}, "delta_bias is"),
        ({"A": torch.zeros(4, 6, 65)}, "N is 1 to 64"),
        ({"u": torch.zeros(2, 4, 6, 3, 5, dtype=torch.int64)}, "real"),
        ({"directions": ("right",)}, "directions are 4"),
        ({"directions": ("right", "left", "down", "sideways")}, "sideways"),
        ({"backend": "fast"}, "backend 'fast' is unknown"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = make(3, 5, torch.float32) | {"directions": ALL} | change
    with pytest.raises(ValueError, match=words):
        scan2d(**arguments)


def test_a_grid_without_tokens_is_refused():
    arguments = make(3, 5, torch.float32)
    empty = {k: t[:, :, :, :0] if t.dim() == 5 else t for k, t in arguments.items()}
    with pytest.raises(ValueError, match="empty"):
        scan2d(**empty, directions=ALL)
