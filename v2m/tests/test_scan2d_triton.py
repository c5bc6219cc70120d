"""The Triton scan of a grid on a machine without a GPU: right in Triton's interpreter, and cheap once it is compiled.

The interpreter accepts what the compiler rejects and the other way round, so both are asked.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from v2m.kernels.scan2d import op
from v2m.tests.test_scan2d import ALL, judge, make, relative_error, run

ROOT = Path(__file__).resolve().parents[2]
# Relative L2 error against the definition in float64: float32 sums, and bfloat16's half unit in the last place.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}
# Instructions of the steady-state loop per step and channel: the bars of the scan of a sequence.
MOST_FORWARD, MOST_BACKWARD = 8.0, 22.0
ROWS, COLUMNS, VIM = ("variable", None), (None, "variable"), ("variable", "variable")
CASES = {
    "a single token": ({"height": 1, "width": 1, "channels": 2, "kinds": ROWS}, ALL),
    "all four directions, rows and columns of unlike length": (
        {"height": 3, "width": 5, "channels": 3, "kinds": VIM},
        ALL,
    ),
    "a sequence": ({"height": 1, "width": 14, "groups": 2, "channels": 2, "kinds": VIM}, ("right", "left")),
    "a column alone": ({"height": 11, "width": 1, "groups": 2, "channels": 2, "kinds": COLUMNS}, ("down", "up")),
    "V2M's rows": ({"height": 2, "width": 9, "groups": 2, "channels": 2, "kinds": ROWS}, ("right", "left")),
    "V2M's columns": ({"height": 9, "width": 2, "channels": 2, "kinds": COLUMNS}, ("down", "up", "down", "up")),
    "fixed B and C": ({"height": 2, "width": 6, "channels": 2, "kinds": ("fixed", "fixed")}, ALL),
    "nothing chosen": ({"height": 2, "width": 3, "channels": 2, "state": 1, "kinds": (None, None)}, ALL),
    "more channels than a program": (
        {"height": 1, "width": 3, "groups": 1, "channels": 40, "state": 2, "kinds": ROWS},
        ("left",),
    ),
    "sixteen states, bfloat16": (
        {"height": 2, "width": 5, "groups": 1, "channels": 32, "state": 16, "kinds": ROWS, "dtype": torch.bfloat16},
        ("up",),
    ),
    "float64": ({"height": 2, "width": 5, "groups": 1, "channels": 3, "kinds": VIM}, ("left",)),
    "a program for several lines": ({"height": 5, "width": 2, "channels": 2, "kinds": ROWS, "enough": 1}, ALL),
    "one state, several channels a thread": (
        {"height": 1, "width": 5, "groups": 1, "channels": 128, "state": 1, "kinds": VIM, "enough": 1},
        ("left",),
    ),
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")


def made(enough: int = 2048, dtype: torch.dtype | None = None, **shape) -> dict:
    """Return the arguments of a case. ``enough``: programs above which each takes more lines or channels."""
    from v2m.kernels.scan2d import triton

    triton.ENOUGH_PROGRAMS = enough
    return make(dtype=dtype or torch.float32, **shape)


def type_of(name: str) -> torch.dtype:
    return torch.float64 if name == "float64" else CASES[name][0].get("dtype", torch.float32)


def check_fakes() -> None:
    """Compare what the operator gives with what its fake promises, where blocks of channels are padded and not."""
    for channels in (3, 32):
        tensors = list(made(height=2, width=3, groups=2, channels=channels, kinds=ROWS).values())
        given = (*tensors, True, [0, 3], "triton", True)
        torch.library.opcheck(op._scan, given, test_utils=("test_schema", "test_faketensor"))
        y, saved = op._scan(*given)
        given = (torch.ones_like(y), *tensors, saved, True, [0, 3], "triton")
        torch.library.opcheck(op._scan_backward, given, test_utils=("test_schema", "test_faketensor"))


def error_of_a_shared_input() -> dict[str, float]:
    """Return the errors where all groups read one u, and u, delta and B lie in memory otherwise than y."""
    arguments = made(height=2, width=3, channels=2, kinds=ROWS)
    arguments["u"] = arguments["u"][:, :1].expand(-1, 4, -1, -1, -1)
    expected = judge(arguments)
    first = run(arguments, backend="triton")
    other = {k: t if t is None or t.dim() != 5 else t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
             for k, t in arguments.items()}  # fmt: skip
    again = run(other, backend="triton")
    return {k: max(relative_error(outputs[k], value) for outputs in (first, again)) for k, value in expected.items()}


def interpreted_errors() -> dict[str, dict[str, float]]:
    """Return the errors of outputs and gradients of every case; to be called under TRITON_INTERPRET=1."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    check_fakes()
    errors = {}
    for name, (shape, directions) in CASES.items():
        arguments = made(**shape | {"dtype": type_of(name)})
        got = run(arguments, directions, "triton", given_in=type_of(name))
        if name == "fixed B and C":  # whose sums are over tokens, lines and programs
            again = run(arguments, directions, "triton", given_in=type_of(name))
            assert all(torch.equal(got[key], again[key]) for key in got), "not the same twice"
        errors[name] = {key: relative_error(got[key], value) for key, value in judge(arguments, directions).items()}
    return errors | {"one input for all groups, in another order": error_of_a_shared_input()}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    code = "import json; from v2m.tests import test_scan2d_triton as test; print(json.dumps(test.interpreted_errors()))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*CASES, "one input for all groups, in another order"])
def test_outputs_and_gradients_are_those_of_the_definition(name, errors):
    bound = ERROR[type_of(name) if name in CASES else torch.float32]
    assert {key: error for key, error in errors[name].items() if not error <= bound} == {}


# The forms that are counted, at N = 16 in bfloat16, with softplus and bias. Kinds of B and C: 0 is the constant 1, 1
# fixed, 2 variable.
PLAIN = {"PADDED": 16, "CHANNELS": 32, "SOFTPLUS": True, "KIND_B": 2, "KIND_C": 2, "EVEN": True}
COUNTED = {"V2M's rows": {"KIND_C": 0}, "V2M's columns": {"KIND_B": 0}, "a sequence, as Vim's": {}}


def compiled(direction: str, capability: int, changes: dict):
    """Return the static cost of a form of a kernel."""
    from v2m.kernels.scan2d import triton_backward, triton_forward
    from v2m.kernels.scan2d.triton import STEPS, state_blocks
    from v2m.tests.static_cost import static_cost

    kernel = triton_forward.scan_forward if direction == "forward" else triton_backward.scan_backward
    inputs = changes.get("inputs", "bf16")
    constants = PLAIN | changes | {"STEPS": STEPS}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if direction == "backward":
        constants["BLOCKS"] = state_blocks(constants["PADDED"])
    options = {"num_warps": 1, "num_stages": 1}
    return static_cost(kernel, signature(kernel, constants, inputs), constants, options, capability)


@functools.cache
def cost(direction: str, capability: int, form: str):
    return compiled(direction, capability, COUNTED[form])


def signature(kernel, constants: dict, inputs: str) -> dict[str, str]:
    """Return the parameters' types as a launch finds them on aligned tensors whose type is ``inputs``."""
    in_type = {"u_ptr", "delta_ptr", "y_ptr", "dy_ptr", "du_ptr", "ddelta_ptr"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return f"*{inputs}:16" if name in in_type else "*fp32:16"
        if name == "directions":
            return "i64"
        return "i64:16" if name in ("u_batch", "u_group") else "i32:16" if name == "width" else "i32"

    return {name: kind(name) for name in kernel.arg_names}


@pytest.mark.parametrize("form", COUNTED)
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("direction, most", [("forward", MOST_FORWARD), ("backward", MOST_BACKWARD)])
def test_the_compiled_loop_is_short_and_nothing_is_spilled(direction, most, capability, form, record_property):
    from v2m.kernels.scan2d.triton import STEPS

    counted = cost(direction, capability, form)
    each = counted.per(STEPS, 32)
    record_property("instructions per step and channel", each)
    sys.stdout.write(
        f"sm_{capability} {direction}, {form}: {each:.2f} a step and channel, {counted.per_line(STEPS, 32, 14):.2f} in "
        f"lines of 14 (loop {counted.loop}, line {counted.line}, program {counted.program}), "
        f"{counted.registers} registers, {counted.spill_bytes} bytes spilled\n"
    )
    assert each <= most
    assert counted.spill_bytes == 0


# What a launch may find otherwise than in the forms above.
FORMS = {
    "inference": {"saved_ptr": None},
    "without bias and softplus": {"bias_ptr": None, "dbias_ptr": None, "SOFTPLUS": False},
    "one state": {"PADDED": 1},
    "uneven, few states": {"PADDED": 8, "EVEN": False},
    "many states": {"PADDED": 64, "CHANNELS": 8},
    "fixed B": {"KIND_B": 1},
    "fixed B and C": {"KIND_B": 1, "KIND_C": 1},
    "nothing chosen": {"KIND_B": 0, "KIND_C": 0},
    "float32": {"inputs": "fp32"},
    "float16": {"inputs": "fp16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles(form, direction):
    if direction == "backward" and "saved_ptr" in FORMS[form]:
        pytest.skip("a backward has the kept states")
    assert compiled(direction, 90, FORMS[form]).loop > 0
