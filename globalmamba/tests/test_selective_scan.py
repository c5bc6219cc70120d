"""The selective scan: every backend against the definition, and the operator under torch's own tools."""

import functools
import io
import itertools
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from globalmamba.kernels.selective_scan import op, selective_scan
from globalmamba.tests.golden_files import golden, relative_error

GOLDEN = ("fixed_BC_plain", "grouped", "unit_B", "unit_C", "variable")
GOLDEN_ERROR = 1e-9  # float64 against float64: only the order of sums differs
# Relative L2 error against the definition in float64 on the same inputs: outputs and gradients are rounded
# once to the type of the inputs (half a unit in the last place is 2^-9 and 2^-12), float32 sums drift a little.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}
LENGTHS = (1, 7, 14, 31, 63, 196, 197, 255, 1023)
OPTIONS = list(itertools.product((False, True), repeat=4))  # D, z, delta_bias, delta_softplus
KINDS = ("fixed", "variable", "grouped")
HERE = [name for name in ("chunked", "cpu") if not op._unavailable(name)]


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def make(length, dtype=torch.float32, options=(True,) * 4, kinds=("variable", "variable"), **shape):
    """Return arguments of ``selective_scan`` by name, those of time in ``dtype``, all requiring gradients."""
    batch, width, state, layout = (shape.get(k, d) for k, d in SHAPE.items())
    generator = torch.Generator().manual_seed(length)
    kept = torch.promote_types(dtype, torch.float32)

    def draw(*size, into=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(into)

    def in_time():
        tensor = draw(batch, length, width)
        return tensor.transpose(1, 2) if layout == "BLD" else tensor.transpose(1, 2).contiguous()

    sizes = {
        "fixed": (width, state),
        "variable": (batch, state, length),
        "grouped": (batch, 2, state, length),
        "four": (batch, 4, state, length),
    }
    has_D, has_z, has_bias, softplus = options
    delta = in_time() if softplus else in_time().abs() * 0.3
    arguments = {"u": in_time(), "delta": delta, "A": -torch.rand(width, state, generator=generator).to(kept) * 2}
    arguments |= {name: draw(*sizes[kind]) for name, kind in zip("BC", kinds, strict=True)}
    arguments |= {"D": draw(width, into=kept)} if has_D else {}
    arguments |= {"z": in_time()} if has_z else {}
    # Without the softplus a negative step would let the state grow, and every rounding error with it.
    bias = draw(width, into=kept)
    arguments |= {"delta_bias": bias if softplus else bias.abs() * 0.1} if has_bias else {}
    return {name: tensor.requires_grad_() for name, tensor in arguments.items()} | {"delta_softplus": softplus}


SHAPE = {"batch": 2, "width": 12, "state": 5, "layout": "BDL"}


def run(arguments: dict, given_in=None, **options) -> dict[str, torch.Tensor]:
    """Return y, the last state and the gradient to every argument, for fixed gradients to both outputs.

    The gradient to y is rounded to ``given_in`` or to u's type, so that all backends get the same.
    """
    inputs = {name: t.detach().clone().requires_grad_() if torch.is_tensor(t) else t for name, t in arguments.items()}
    y, last = selective_scan(**inputs, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, last)]
    upstream = [
        upstream[0].to(given_in or y.dtype).to(y.dtype),
        upstream[1].to(torch.promote_types(given_in or y.dtype, torch.float32)).to(last.dtype),
    ]
    torch.autograd.backward([y, last], upstream)
    gradients = {name: t.grad for name, t in inputs.items() if torch.is_tensor(t)}
    return {"y": y.detach(), "last": last.detach()} | gradients


def judge(arguments: dict, **options) -> dict[str, torch.Tensor]:
    """Return what ``run`` returns, by the definition in float64."""
    exact = {name: t.detach().double() if torch.is_tensor(t) else t for name, t in arguments.items()}
    return run(exact, given_in=arguments["u"].dtype, backend="reference", **options)


def assert_same(got: dict, expected: dict, bound: float) -> None:
    for name, value in expected.items():
        error = relative_error(got[name], value)
        assert error <= bound, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["reference", *HERE])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs_and_gradients_are_reproduced(name, backend):
    inputs = golden(f"scan1d_{name}", "in_")
    dy = inputs.pop("dy")
    inputs = {key: tensor.requires_grad_() for key, tensor in inputs.items()}
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
    y.backward(dy)
    outputs = golden(f"scan1d_{name}", "out_")
    assert_same({"y": y, "last_state": last}, outputs, GOLDEN_ERROR)
    gradients = golden(f"scan1d_{name}", "grad_")
    assert set(gradients) == set(inputs)
    assert_same({key: tensor.grad for key, tensor in inputs.items()}, gradients, GOLDEN_ERROR)


@pytest.mark.parametrize("backend", ["reference", *HERE])
@pytest.mark.parametrize("kinds", [("variable", "grouped"), ("fixed", "grouped"), ("grouped", "fixed")])
def test_gradients_agree_with_finite_differences(kinds, backend):
    arguments = make(5, torch.float64, kinds=kinds, batch=1, width=4, state=2)
    names = [name for name, value in arguments.items() if torch.is_tensor(value)]

    def scan(*tensors):
        back = (False, True) if kinds[0] != "variable" else True
        options = {"delta_softplus": True, "return_last_state": True, "reverse": back}
        return selective_scan(**dict(zip(names, tensors, strict=True)), **options, backend=backend)

    assert torch.autograd.gradcheck(scan, [arguments[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_and_type_matches_the_definition(length, dtype, backend, poisoned):
    layout = ("BDL", "BLD")[length % 2]
    arguments = make(length, dtype, layout=layout)
    assert_same(run(arguments, backend=backend), judge(arguments), ERROR[dtype])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_on_and_off_matches_the_definition(options, backend, poisoned):
    arguments = make(37, options=options, kinds=("grouped", "variable"))
    assert_same(run(arguments, backend=backend), judge(arguments), ERROR[torch.float32])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=2)))
def test_every_form_of_B_and_C_matches_the_definition(kinds, backend, poisoned):
    arguments = make(33, torch.float64, kinds=kinds)
    assert_same(run(arguments, backend=backend), judge(arguments), ERROR[torch.float64])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("state", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("batch, width", [(1, 1), (1, 40), (3, 130)])
def test_every_size_of_state_batch_and_width_matches_the_definition(batch, width, state, backend, poisoned):
    arguments = make(34, batch=batch, width=width, state=state, layout="BLD")
    assert_same(run(arguments, backend=backend), judge(arguments), ERROR[torch.float32])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("reverse", [True, (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["fixed", "grouped"])
def test_reversed_groups_match_the_definition(kind, reverse, backend, poisoned):
    arguments = make(70, kinds=(kind, kind))
    assert_same(run(arguments, backend=backend, reverse=reverse), judge(arguments, reverse=reverse), 2e-6)


def test_a_reversed_scan_is_the_flipped_scan_of_flipped_inputs():
    arguments = make(9, torch.float64)
    turned = {name: t.flip(-1) if torch.is_tensor(t) and t.dim() == 3 else t for name, t in arguments.items()}
    expected = selective_scan(**turned, backend="reference").flip(-1)
    assert torch.equal(selective_scan(**arguments, backend="reference", reverse=True), expected)


@pytest.mark.parametrize("backend", HERE)
def test_the_backward_is_bitwise_the_same_twice(backend):
    arguments = make(197, width=96, state=16, kinds=("grouped", "variable"))
    first, second = run(arguments, backend=backend), run(arguments, backend=backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", HERE)
def test_an_expanded_output_gradient_is_taken(backend):
    arguments = make(20)
    inputs = {name: t.detach().clone().requires_grad_() if torch.is_tensor(t) else t for name, t in arguments.items()}
    exact = {name: t.detach().double().requires_grad_() if torch.is_tensor(t) else t for name, t in arguments.items()}
    selective_scan(**inputs, backend=backend).sum().backward()
    selective_scan(**exact, backend="reference").sum().backward()
    named = [name for name, t in inputs.items() if torch.is_tensor(t)]
    assert_same({n: inputs[n].grad for n in named}, {n: exact[n].grad for n in named}, 2e-6)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("layout", ["BDL", "BLD"])
def test_the_operator_keeps_its_promises_to_torch(layout, backend):
    arguments = make(35, kinds=("grouped", "fixed"), layout=layout)
    tensors = [arguments.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    torch.library.opcheck(op._scan, (*tensors, True, [False, True], backend, True))


@pytest.mark.parametrize("backend", HERE)
def test_a_compiled_scan_gives_the_same(backend):
    arguments = make(40)
    scan = functools.partial(selective_scan, delta_softplus=True, backend=backend)
    tensors = {name: t for name, t in arguments.items() if torch.is_tensor(t)}
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**tensors), scan(**tensors))
    loss = [f(**tensors).square().sum() for f in (compiled, scan)]
    wanted = list(tensors.values())
    for got, expected in zip(*(torch.autograd.grad(value, wanted) for value in loss), strict=True):
        assert torch.equal(got, expected)


class Mixed(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True, backend=self.backend, reverse=(False, True))


def exportable():
    arguments = make(6, options=(False, False, False, True), kinds=("grouped", "grouped"))
    return tuple(arguments[name].detach() for name in ("u", "delta", "A", "B", "C"))


@pytest.mark.parametrize("backend", HERE)
def test_an_exported_scan_gives_the_same(backend):
    inputs = exportable()
    exported = torch.export.export(Mixed(backend), inputs)
    assert "globalmamba.selective_scan" in str(exported.graph)
    assert torch.equal(exported.module()(*inputs), Mixed(backend)(*inputs))


def test_the_reference_exports_to_onnx():
    evaluator = pytest.importorskip("onnx.reference", reason="onnx is a development dependency")
    import onnx

    inputs, file = exportable(), io.BytesIO()
    torch.onnx.export(Mixed("reference").eval(), inputs, file, dynamo=True, verbose=False)
    session = evaluator.ReferenceEvaluator(onnx.load_from_string(file.getvalue()))
    (got,) = session.run(None, dict(zip(session.input_names, (t.numpy() for t in inputs), strict=True)))
    assert relative_error(torch.from_numpy(got), Mixed("reference")(*inputs).double()) < ERROR[torch.float32]


@pytest.mark.parametrize("backend", HERE)
def test_flops_are_nine_for_every_step_of_every_state(backend):
    arguments = make(8, batch=2, width=12, state=5)
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**arguments, backend=backend)
    assert counter.get_total_flops() == 9 * 2 * 8 * 12 * 5
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 9 * 2 * 8 * 12 * 5


@pytest.mark.parametrize(
    "change, words",
    [
        ({"A": torch.zeros(11, 5)}, "A"),
        ({"A": torch.zeros(12, 65)}, "1 to 64"),
        ({"B": torch.zeros(2, 5, 5, 4)}, "B is"),
        ({"C": torch.zeros(2, 6, 4)}, "C is"),
        ({"D": torch.zeros(5)}, "D is"),
        ({"delta": torch.zeros(2, 12, 5)}, "delta has"),
        ({"reverse": (True,) * 5}, "directions"),
        ({"reverse": (True, False)}, "multiple of the 2 directions"),
        ({"A": torch.zeros(12, 5, dtype=torch.complex64)}, "real"),
        ({"backend": "fast"}, "choose one of"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        selective_scan(**(make(4) | change))


def test_a_backend_that_cannot_run_here_says_why():
    if not op._unavailable("mamba_ssm"):
        pytest.skip("mamba-ssm is installed")
    with pytest.raises(RuntimeError, match="not installed"):
        selective_scan(**make(4), backend="mamba_ssm")


def test_without_a_compiler_the_scan_falls_back_with_one_line(monkeypatch, caplog):
    op._automatic.cache_clear()
    monkeypatch.setattr(op, "_unavailable", lambda name: "no compiler")
    try:
        with caplog.at_level("WARNING"):
            assert op._resolve("auto", "cpu") == op._resolve("auto", "cpu") == "chunked"
        assert len(caplog.records) == 1 and "no compiler" in caplog.text
    finally:
        op._automatic.cache_clear()


@pytest.mark.parametrize("backend", HERE)
def test_inputs_of_several_types_are_computed_in_the_widest(backend):
    arguments = make(300, options=(False, False, False, True))
    arguments["u"] = arguments["u"].detach().bfloat16().requires_grad_()
    got, wanted = run(arguments, backend=backend), judge(arguments)
    assert got["y"].dtype == torch.bfloat16
    assert relative_error(got["last"], wanted["last"]) < ERROR[torch.float32]


@pytest.mark.parametrize("backend", HERE)
def test_autocast_does_not_reach_inside(backend):
    arguments = make(40)
    expected = run(arguments, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(arguments, backend=backend)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("backend", HERE)
def test_a_transposed_A_gets_a_gradient_in_its_own_memory_order(backend):
    arguments = make(35, kinds=("fixed", "fixed"))
    for name in "ABC":
        arguments[name] = arguments[name].detach().t().contiguous().t().requires_grad_()
    tensors = [arguments.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    y, _, saved = op._scan(*tensors, True, [False], backend, True)
    with torch.no_grad():
        given = (torch.ones_like(y), None, *tensors, saved, True, [False], backend)
        gradients = op._scan_backward(*given)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert gradient.stride() == torch.empty_like(tensor).stride()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler is here")
def test_where_there_is_a_compiler_the_compiled_forms_run():
    from globalmamba.kernels.short_conv import cpu as short_conv

    assert op._unavailable("cpu") == short_conv.unavailable() == ""
