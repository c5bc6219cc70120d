"""What only a GPU can show of the selective scan: that its Triton form is right there, then how fast it is.

    python -m globalmamba.gpu_evidence --out FOLDER [--mamba-ssm-source FOLDER]      (make gpu-evidence OUT=FOLDER)

First every case is checked against the definition in float64, outputs and all gradients. Only if all of them hold
is anything timed: Triton beside mamba-ssm's CUDA scan, where that is installed or its source folder is given
(compiled for this GPU alone, into torch's extension cache), one call of each in turn. All of it goes into
``FOLDER/selective_scan.json``. Exit code 1 where a check is red, 2 without a GPU.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from globalmamba.kernels.selective_scan import op, selective_scan
from shared.errors import UserError
from shared.metrics.record import environment, git_state
from shared.run.config import repository_root

# Relative L2 error: half a unit in the last place of the outputs' type, and float32's drift over the sums.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# batch, width, L, N: Vim-S as it trains, a long sequence with few of them, VMamba-T's first stage (four directions).
SHAPES = {"Vim-S": (128, 768, 197, 16), "long": (8, 768, 3136, 16), "N = 1": (64, 384, 3136, 1)}
LAYOUTS = ("channels first", "channels last")
REPEATS = 30
CHECKED = [
    {"length": length, "state": state, "dtype": dtype, "reverse": reverse, "transposed": transposed}
    for length, state in ((1, 16), (7, 1), (14, 16), (63, 5), (197, 16), (1023, 16), (255, 64))
    for dtype in BOUND
    for reverse, transposed in (((False,), False), ((False, True), True))
]


def inputs(
    batch: int, width: int, length: int, state: int, dtype: torch.dtype, transposed: bool, groups: int = 1
) -> dict[str, Tensor]:
    """Return arguments of a scan by name on the GPU; ``transposed`` gives them as (batch, L, width) in memory."""
    generator = torch.Generator("cuda").manual_seed(length * 64 + state)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    found = {name: draw(batch, length, width).transpose(1, 2) for name in ("u", "delta", "z")}
    if not transposed:
        found = {name: tensor.contiguous() for name, tensor in found.items()}
    found |= {name: draw(batch, groups, state, length) for name in ("B", "C")}
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    return found | {"A": -draw(width, state).abs(), "D": draw(width), "delta_bias": draw(width)}


def outcome(arguments: dict[str, Tensor], dy: Tensor, **options) -> dict[str, Tensor]:
    """Return y, the last state and the gradient to every argument."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    y, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, **options)
    torch.autograd.backward([y, last], [dy.to(y.dtype), torch.ones_like(last)])
    return {"y": y, "last": last} | {name: leaf.grad for name, leaf in leaves.items()}


def check(length: int, state: int, dtype: torch.dtype, reverse: tuple[bool, ...], transposed: bool) -> dict:
    """Return the case with its largest relative error, where that was, and whether it is within the bound."""
    arguments = inputs(2, 48, length, state, dtype, transposed, len(reverse))
    dy = torch.randn(2, 48, length, device="cuda").to(dtype)
    exact = {name: tensor.double() for name, tensor in arguments.items()}
    wanted = outcome(exact, dy, backend="reference", reverse=reverse)
    first, again = (outcome(arguments, dy, backend="triton", reverse=reverse) for _ in range(2))
    errors = {
        name: float((first[name].double() - value).norm() / value.norm().clamp_min(1e-30))
        for name, value in wanted.items()
    }
    worst = max(errors, key=errors.get)
    repeatable = all(torch.equal(first[name], again[name]) for name in first)
    case = {
        "length": length,
        "state": state,
        "dtype": str(dtype),
        "reverse": reverse,
        "transposed": transposed,
    }
    green = errors[worst] <= BOUND[dtype] and repeatable
    return case | {"worst": worst, "error": errors[worst], "repeatable": repeatable, "green": green}


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Return median, least and largest time of every call on the GPU, one of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(REPEATS + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end))
    return {n: {"median": statistics.median(t), "least": min(t), "largest": max(t)} for n, t in times.items()}


def peer(source: Path | None):
    """Return mamba-ssm's CUDA extension, installed or compiled from its source folder; None without either."""
    if source is not None:
        from torch.utils.cpp_extension import load

        folder = source / "csrc" / "selective_scan"
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing: give the folder of mamba-ssm's source with --mamba-ssm-source"
            )
        os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
        files = [str(path) for path in (*folder.glob("*.cpp"), *folder.glob("*.cu"))]
        flags = ["-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
        flags += [f"-U__CUDA_NO_{kind}_OPERATORS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162", "HALF2")]
        flags += [f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162")]
        return load("selective_scan_cuda", files, extra_include_paths=[str(folder)], extra_cuda_cflags=flags)
    try:
        import selective_scan_cuda
    except ImportError:
        return None
    return selective_scan_cuda


def timed(shape: tuple[int, int, int, int], extension) -> dict:
    """Return forward and backward times of a shape in bfloat16, of mamba-ssm's too where it is there."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    # mamba-ssm wants channels first; Triton is timed on that and on channels last.
    both = {layout: inputs(*shape, torch.bfloat16, layout == "channels last") for layout in LAYOUTS}
    dy = torch.randn_like(both["channels first"]["u"])
    forwards, backwards = {}, {}
    for layout, arguments in both.items():
        ordered = [arguments[name] for name in names]
        forwards[f"triton, {layout}"] = lambda o=ordered: op._module("triton").forward(
            *o, True, (False,), True
        )
        saved = forwards[f"triton, {layout}"]()[2]
        given = dy if layout == "channels first" else dy.transpose(1, 2).contiguous().transpose(1, 2)
        backwards[f"triton, {layout}"] = lambda o=ordered, s=saved, g=given: op._module("triton").backward(
            g, None, *o, s, True, (False,)
        )
    if extension is not None:
        ordered = [both["channels first"][name] for name in names]
        forwards["mamba-ssm"] = lambda: extension.fwd(*ordered, True)
        out, states, *_ = extension.fwd(*ordered, True)
        backwards["mamba-ssm"] = lambda: extension.bwd(*ordered, dy, states, out, None, True, False)
    return {"forward": milliseconds(forwards), "backward": milliseconds(backwards)}


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of copying 1 GiB on the GPU."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds({"copy": lambda: target.copy_(source)})["copy"]["median"] / 1e3)


def share_of_copy(shape: tuple[int, int, int, int], seconds: float, bandwidth: float) -> float:
    """Return which share of the copy bandwidth a forward reaches that reads u, delta, z and writes y in bfloat16."""
    batch, width, length, _ = shape
    return 4 * 2 * batch * width * length / seconds / bandwidth


def measure(out: Path, source: Path | None) -> int:
    """Check, then time, and write the JSON; return the exit code."""
    if not torch.cuda.is_available():
        raise UserError("no GPU is visible to PyTorch: run this on a machine with one")
    reason = op._unavailable("triton")
    if reason:
        raise UserError(f"the Triton scan cannot run here: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    commit, dirty = git_state(repository_root())
    found: dict = {"commit": commit, "dirty": dirty, **environment(), "checks": [check(**c) for c in CHECKED]}
    green = all(case["green"] for case in found["checks"])
    if green:
        extension, bandwidth = peer(source), copy_bandwidth()
        found |= {"repeats": REPEATS, "copy_bytes_per_second": bandwidth, "mamba_ssm": extension is not None}
        found["milliseconds"] = {name: timed(shape, extension) for name, shape in SHAPES.items()}
        one = found["milliseconds"]["N = 1"]["forward"]["triton, channels last"]["median"] / 1e3
        found["share_of_copy_at_N_1"] = share_of_copy(SHAPES["N = 1"], one, bandwidth)
    partial = out / "selective_scan.json.partial"
    partial.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    os.replace(partial, out / "selective_scan.json")
    return 0 if green else 1


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 where a check is red, 2 after one sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m globalmamba.gpu_evidence", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the figures")
    parser.add_argument(
        "--mamba-ssm-source", type=Path, help="a checkout of mamba-ssm to compile and time beside"
    )
    options = parser.parse_args(arguments)
    try:
        return measure(options.out, options.mamba_ssm_source)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
