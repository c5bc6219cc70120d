"""The Triton scan on a machine without a GPU: right in Triton's interpreter, and cheap once it is compiled.

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

from globalmamba.kernels.selective_scan import op, selective_scan
from globalmamba.tests.test_selective_scan import judge, make, relative_error, run

ROOT = Path(__file__).resolve().parents[2]
# Relative L2 error against the definition in float64: float32 sums, and bfloat16's half unit in the last place.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}
# Instructions of the steady-state loop per time step and channel; a prototype took 5.75 and 19.7, mamba-ssm 25 and 59.
MOST_FORWARD, MOST_BACKWARD = 8.0, 22.0
OFF = (False,) * 4
CASES = {
    "one step of one state": ({"length": 1, "state": 1}, False),
    "three states, seven steps": ({"length": 7, "state": 3}, False),
    "sixteen states, backwards": ({"length": 33, "state": 16}, True),
    "both directions, channels last": ({"length": 13, "kinds": ("grouped", "grouped"), "layout": "BLD"}, (False, True)),
    "nothing but the recurrence": ({"length": 9, "options": OFF, "kinds": ("fixed", "fixed")}, True),
    "fixed B": ({"length": 9, "kinds": ("fixed", "grouped")}, (True, False)),
    "more channels than a program": ({"length": 9, "width": 40, "state": 2}, False),
    "float64": ({"length": 9, "state": 16, "dtype": torch.float64}, False),
    "four directions, unlike layouts": (
        {"length": 12, "width": 24, "kinds": ("four", "four"), "layout": "BLD", "delta": "BDL"},
        (False, True, True, False),
    ),
    # As networks call it: blocks of channels that fill their groups.
    "whole blocks": ({"length": 11, "width": 64, "state": 16}, False),
    "both directions, several whole blocks": (
        {"length": 6, "width": 128, "kinds": ("grouped", "grouped"), "layout": "BLD"},
        (False, True),
    ),
    "a B that two groups of C share": ({"length": 6, "width": 64, "kinds": ("variable", "grouped")}, False),
    "one state, several channels a thread": ({"length": 9, "width": 128, "state": 1, "enough": 1}, True),
    "more states than a thread holds": ({"length": 6, "state": 40}, True),
    "bfloat16, channels last": ({"length": 9, "state": 16, "dtype": torch.bfloat16, "layout": "BLD"}, False),
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")


def made(delta: str = "", enough: int = 2048, **shape) -> dict:
    """Return the arguments of a case.

    ``delta``: BDL where it lies in memory otherwise than u. ``enough``: programs above which each takes more channels.
    """
    from globalmamba.kernels.selective_scan import triton

    triton.ENOUGH_PROGRAMS = enough
    arguments = make(**shape)
    if delta == "BDL":
        arguments["delta"] = arguments["delta"].detach().contiguous().requires_grad_()
    return arguments


def check_fakes() -> None:
    """Compare what the operator gives with what its fake promises, where blocks of channels are padded and not."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    for width, layout in ((24, "BDL"), (64, "BLD")):
        arguments = made(length=7, width=width, layout=layout, kinds=("grouped", "grouped"))
        tensors = [arguments[name].detach() for name in names]
        given = (*tensors, True, [False, True], "triton", True)
        torch.library.opcheck(op._scan, given, test_utils=("test_schema", "test_faketensor"))
        y, _, saved = op._scan(*given)
        given = (torch.ones_like(y), None, *tensors, saved, True, [False, True], "triton")
        torch.library.opcheck(op._scan_backward, given, test_utils=("test_schema", "test_faketensor"))


def error_of_cut_out_rows() -> dict[str, float]:
    """Return the errors where D and the bias are columns of a matrix, u a part of a wider tensor, A transposed."""
    arguments = {name: t.detach() if torch.is_tensor(t) else t for name, t in made(length=5).items()}
    wanted = selective_scan(**arguments, backend="triton")
    for name in ("D", "delta_bias"):
        arguments[name] = torch.stack([arguments[name]] * 3, 1)[:, 1]
    arguments["u"] = torch.cat([arguments["u"]] * 2, 1)[:, 12:]
    arguments["A"] = arguments["A"].t().contiguous().t()
    return {"y": relative_error(selective_scan(**arguments, backend="triton"), wanted)}


def interpreted_errors() -> dict[str, dict[str, float]]:
    """Return the errors of outputs and gradients of every case; to be called under TRITON_INTERPRET=1."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    check_fakes()
    errors = {}
    for name, (shape, reverse) in CASES.items():
        arguments = made(**shape)
        first, again = (run(arguments, backend="triton", reverse=reverse) for _ in range(2))
        assert all(torch.equal(first[key], again[key]) for key in first), f"{name}: not the same twice"
        exact = judge(arguments, reverse=reverse)
        errors[name] = {key: relative_error(first[key], value) for key, value in exact.items()}
    return errors | {"rows and channels cut out of larger tensors": error_of_cut_out_rows()}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    code = (
        "import json; from globalmamba.tests import test_selective_scan_triton as test; "
        "print(json.dumps(test.interpreted_errors()))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*CASES, "rows and channels cut out of larger tensors"])
def test_outputs_and_gradients_are_those_of_the_definition(name, errors):
    dtype = CASES[name][0].get("dtype", torch.float32) if name in CASES else torch.float32
    bound = ERROR[dtype]
    assert {key: error for key, error in errors[name].items() if not error <= bound} == {}


# The form that is counted: channels last, with softplus, D, bias and gate, all gradients given.
PLAIN = {"N": 16, "PADDED": 16, "CHANNELS": 32, "SOFTPLUS": True, "FIXED_B": False, "FIXED_C": False}
PLAIN |= {"EVEN": True, "channel_stride": 1}


def compiled(direction: str, capability: int, changes: dict):
    """Return the static cost of a form of a kernel in bfloat16, with softplus, D, bias and gate."""
    from globalmamba.kernels.selective_scan import triton_backward, triton_forward
    from globalmamba.kernels.selective_scan.triton import STEPS, state_blocks
    from globalmamba.tests.static_cost import static_cost

    kernel = triton_forward.scan_forward if direction == "forward" else triton_backward.scan_backward
    inputs = changes.get("inputs", "bf16")
    gone = {} if "z_ptr" not in changes else {"dz_ptr": None}
    constants = PLAIN | changes | gone | {"STEPS": STEPS}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names and v != "i32"}
    if direction == "backward":
        constants["BLOCKS"] = state_blocks(constants["PADDED"])
    options = {"num_warps": 1, "num_stages": 1}
    return static_cost(kernel, signature(kernel, constants, inputs), constants, options, capability)


@functools.cache
def cost(direction: str, capability: int):
    """Return the static cost of a kernel at N = 16, channels last."""
    return compiled(direction, capability, {})


def signature(kernel, constants: dict, inputs: str) -> dict[str, str]:
    """Return the parameters' types as a launch finds them on aligned tensors whose type is ``inputs``."""
    in_state_type = {"A_ptr", "B_ptr", "C_ptr", "D_ptr", "bias_ptr", "last_ptr", "saved_ptr", "dlast_ptr"}
    in_state_type |= {"dA_ptr", "dB_ptr", "dC_ptr", "dD_ptr", "dbias_ptr"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*fp32:16" if name in in_state_type else f"*{inputs}:16"
        return "i32:16" if name.endswith("_stride") or name in ("width", "group_width") else "i32"

    return {name: kind(name) for name in kernel.arg_names}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("direction, most", [("forward", MOST_FORWARD), ("backward", MOST_BACKWARD)])
def test_the_compiled_loop_is_short(direction, most, capability, record_property):
    from globalmamba.kernels.selective_scan.triton import STEPS

    counted = cost(direction, capability)
    each = counted.per(STEPS, 32)
    record_property("instructions per step and channel", each)
    sys.stdout.write(
        f"sm_{capability} {direction}: {each:.2f} a step and channel (loop {counted.loop}, "
        f"prologue {counted.prologue}, epilogue {counted.epilogue}), {counted.registers} registers, "
        f"{counted.spill_bytes} bytes spilled\n"
    )
    assert each <= most


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nothing_is_spilled(direction, capability):
    assert cost(direction, capability).spill_bytes == 0


# What a launch may find otherwise than in the form above, which has everything; None: not a constant.
FORMS = {
    "as Vim trains: no gate, no last state's gradient": {"z_ptr": None, "dlast_ptr": None},
    "inference": {"saved_ptr": None},
    "the recurrence alone": {"z_ptr": None, "D_ptr": None, "bias_ptr": None, "SOFTPLUS": False},
    "one state": {"N": 1, "PADDED": 1, "CHANNELS": 32},
    "one state, wide": {"N": 1, "PADDED": 1, "CHANNELS": 128, "z_ptr": None, "dlast_ptr": None},
    "uneven, few states": {"N": 5, "PADDED": 8, "EVEN": False},
    "many states": {"N": 64, "PADDED": 64, "CHANNELS": 8},
    "fixed B": {"FIXED_B": True},
    "fixed B and C": {"FIXED_B": True, "FIXED_C": True},
    "channels first": {"channel_stride": "i32"},
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
