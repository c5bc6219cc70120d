"""What only a GPU can show of the selective scan: that its Triton form is right there, then how fast it is.

    make gpu-evidence OUT=FOLDER [MAMBA_SSM=FOLDER] [DATA_ROOT=FOLDER]
    python -m globalmamba.tools.gpu_evidence --out FOLDER [--mamba-ssm-source FOLDER] [--data-root FOLDER] [--workers 4]

First every case is checked against the definition in float64, outputs and all gradients, in fresh memory that holds
NaN. Only if all of them hold is anything timed: Triton beside mamba-ssm's CUDA scan, where that is installed or its
source folder is given (compiled for this GPU alone, into torch's extension cache; needs nvcc and ninja), in turn. All
of it goes into ``FOLDER/selective_scan.json``, which is written anew after every part. With a data root the lite rows
meant for a GPU are trained afterwards, by several processes that share them. Exit code 1 where a check is red or a
training failed, 2 without a GPU; a bar that is missed is a result and changes no exit code.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor

from globalmamba.kernels.selective_scan import op, selective_scan
from globalmamba.tools.scan_evidence import checks_of, mamba_ssm_or_reason, verdict_on
from shared.bench.gpu import CALLS, REPEATS, Figures, milliseconds, require_gpu, run_script, worst_of
from shared.errors import UserError

# Relative L2 error: half a unit in the last place of the outputs' type, and float32's drift over the sums.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# batch, width, L, N, directions: Vim-S of one direction with its gate, the two of a mixer in one launch (the peer is
# called twice), a long sequence with few of them, VMamba-T's first stage (four directions).
SHAPES = {
    "Vim-S": (128, 768, 197, 16, 1),
    "Vim-S, both directions": (128, 1536, 197, 16, 2),
    "long": (8, 768, 3136, 16, 1),
    "N = 1": (64, 384, 3136, 1, 1),
}
BARS = {"Vim-S": (3.0, 2.0), "long": (1.5, 2.0)}  # times mamba-ssm's speed, forward and backward
COPY_BAR = 0.6  # of the bandwidth of a copy, at N = 1 forward
LAYOUTS = ("channels first", "channels last")
GPU_ROWS = ("cifar10-all", "tiny32")
DEVICE = "cuda"


def case(length, state, dtype=torch.float32, reverse=(False,), transposed=False, width=48, absent=()) -> dict:
    """Return a case to check; ``absent`` names optional arguments that are left out, or ``dlast``."""
    return {
        "length": length,
        "state": state,
        "dtype": dtype,
        "reverse": reverse,
        "transposed": transposed,
        "width": width,
        "absent": absent,
    }


BOTH = (False, True)
CHECKED = [
    case(length, state, dtype, reverse, transposed)
    for length, state in ((1, 16), (7, 1), (14, 16), (31, 3), (63, 5), (196, 16), (197, 16), (255, 64), (1023, 16))
    for dtype in BOUND
    for reverse, transposed in (((False,), False), (BOTH, True))
]
# Every option on and off.
OPTIONAL = ("D", "z", "delta_bias", "dlast")
CHECKED += [
    case(63, 16, absent=tuple(itertools.compress(OPTIONAL, off)))
    for off in itertools.product((False, True), repeat=len(OPTIONAL))
]
# What the timed shapes are made of: whole blocks of channels, several in a group.
AS_TIMED = [
    case(length, state, torch.bfloat16, reverse, transposed, width, absent)
    for (length, state, width, reverse, absent), transposed in itertools.product(
        (
            (197, 16, 768, (False,), ("dlast",)),
            (197, 16, 1536, BOTH, ("z", "dlast")),
            (3136, 16, 768, (False,), ("dlast",)),
            (3136, 1, 384, (False,), ("dlast",)),
            (49, 1, 1536, (False, False, True, True), ("z", "dlast")),
        ),
        (False, True),
    )
]


def inputs(
    batch: int, width: int, length: int, state: int, dtype: torch.dtype, transposed: bool, groups: int = 1
) -> dict[str, Tensor]:
    """Return arguments of a scan by name on the GPU; ``transposed`` gives them as (batch, L, width) in memory."""
    generator = torch.Generator(DEVICE).manual_seed(length * 64 + state)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    tensors = {name: draw(batch, length, width).transpose(1, 2) for name in ("u", "delta", "z")}
    if not transposed:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tensors |= {name: draw(batch, groups, state, length) for name in ("B", "C")}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors | {"A": -draw(width, state).abs(), "D": draw(width), "delta_bias": draw(width)}


def outcome(arguments: dict[str, Tensor], dy: Tensor, with_last: bool, **options) -> dict[str, Tensor]:
    """Return y, the last state and the gradient to every argument."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    y, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True, **options)
    slopes = [dy.to(y.dtype)] + ([torch.ones_like(last)] if with_last else [])
    torch.autograd.backward([y, last][: len(slopes)], slopes)
    return {"y": y.detach(), "last": last.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check(length, state, dtype, reverse, transposed, width, absent) -> dict:
    """Return the case with its largest relative error, where that was, and whether it is within the bound."""
    arguments = inputs(2, width, length, state, dtype, transposed, len(reverse))
    arguments = {name: tensor for name, tensor in arguments.items() if name not in absent}
    dy = torch.randn(2, width, length, device=DEVICE).to(dtype)
    exact = {name: tensor.double() for name, tensor in arguments.items()}
    run = functools.partial(outcome, dy=dy, with_last="dlast" not in absent, reverse=reverse)
    wanted = run(exact, backend="reference")
    first, again = (run(arguments, backend="triton") for _ in range(2))
    errors = {
        name: float((first[name].double() - value).norm() / value.norm().clamp_min(1e-30))
        for name, value in wanted.items()
    }
    worst = worst_of(errors)
    repeatable = all(torch.equal(first[name], again[name]) for name in first)
    checked = case(length, state, str(dtype), reverse, transposed, width, absent)
    green = errors[worst] <= BOUND[dtype] and repeatable
    return checked | {"worst": worst, "error": errors[worst], "repeatable": repeatable, "green": green}


def peer_calls(extension, arguments: dict[str, Tensor], dy: Tensor, directions: int) -> tuple[Callable, Callable]:
    """Return mamba-ssm's forward and backward; one call for each direction, each with its part of the channels."""
    parts = [{name: tensor.chunk(directions, 1 if tensor.dim() == 3 else 0)[d].contiguous()
              for name, tensor in arguments.items() if name not in ("B", "C")}
             | {name: arguments[name].chunk(directions, 1)[d].contiguous() for name in ("B", "C")}
             for d in range(directions)]  # fmt: skip
    ordered = [[part.get(name) for name in NAMES] for part in parts]
    slopes = [part.contiguous() for part in dy.chunk(directions, 1)]
    states = [extension.fwd(*arguments, True) for arguments in ordered]

    def backward():
        for arguments, gradient, (out, kept, *_) in zip(ordered, slopes, states, strict=True):
            extension.bwd(*arguments, gradient, kept, out if arguments[6] is not None else None, None, True, False)

    return lambda: [extension.fwd(*arguments, True) for arguments in ordered], backward


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def timed(shape: tuple[int, ...], extension) -> dict:
    """Return forward and backward times of a shape in bfloat16, of mamba-ssm's too where it is there."""
    *sizes, directions = shape
    reverse, scan = tuple(d % 2 == 1 for d in range(directions)), op._module("triton")
    # mamba-ssm wants channels first; Triton is timed on that and on channels last.
    both = {layout: inputs(*sizes, torch.bfloat16, layout == "channels last", directions) for layout in LAYOUTS}
    if directions > 1:  # a mixer of two directions gates their sum
        for arguments in both.values():
            del arguments["z"]
    dy = torch.randn_like(both["channels first"]["u"])
    forwards, backwards = {}, {}
    for layout, arguments in both.items():
        ordered = [arguments.get(name) for name in NAMES]
        forwards[f"triton, {layout}"] = lambda o=ordered: scan.forward(*o, True, reverse, True)
        saved = forwards[f"triton, {layout}"]()[2]
        slope = dy if layout == "channels first" else dy.transpose(1, 2).contiguous().transpose(1, 2)
        backwards[f"triton, {layout}"] = lambda o=ordered, s=saved, g=slope: scan.backward(
            g, None, *o, s, True, reverse
        )
    if not isinstance(extension, str):
        pair = peer_calls(extension, both["channels first"], dy, directions)
        forwards["mamba-ssm"], backwards["mamba-ssm"] = pair
    return {"forward": milliseconds(forwards), "backward": milliseconds(backwards)}


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of copying 1 GiB on the GPU."""
    source = torch.empty(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds({"copy": lambda: target.copy_(source)})["copy"]["median"] / 1e3)


def share_of_copy(shape: tuple[int, ...], seconds: float, bandwidth: float) -> float:
    """Return which share of the copy bandwidth a forward reaches that reads u, delta, z and writes y in bfloat16."""
    batch, width, length, *_ = shape
    return 4 * 2 * batch * width * length / seconds / bandwidth


def bars(figures: dict) -> list[dict]:
    """Return what was promised of each shape beside what was measured: layout by layout, none left out."""
    rows = []
    for shape, wanted in BARS.items():
        times = figures["milliseconds"].get(shape, {})
        for of, bar in zip(("forward", "backward"), wanted, strict=True):
            medians = {name: time["median"] for name, time in times.get(of, {}).items()}
            theirs = medians.pop("mamba-ssm", None)
            for name, ours in medians.items() if theirs else ():
                rows.append(
                    {"bar": f"{shape}, {of}, {name}: times mamba-ssm", "wanted": bar, "measured": theirs / ours}
                )
    for name, time in figures["milliseconds"].get("N = 1", {}).get("forward", {}).items():
        share = share_of_copy(SHAPES["N = 1"], time["median"] / 1e3, figures["copy_bytes_per_second"])
        if name != "mamba-ssm":
            rows.append({"bar": f"N = 1, forward, {name}: share of a copy", "wanted": COPY_BAR, "measured": share})
    return [row | {"holds": row["measured"] >= row["wanted"]} for row in rows]


def times_of(figures: dict) -> Table:
    table = Table("shape", "pass", "form", "ms, median", "least", "largest")
    for shape, passes in figures.get("milliseconds", {}).items():
        for of, forms in passes.items():
            for name, time in forms.items():
                table.add_row(shape, of, name, *(f"{time[key]:.3f}" for key in ("median", "least", "largest")))
    return table


def require_triton() -> None:
    """Raise UserError where Triton cannot run on a GPU."""
    require_gpu()
    reason = op._unavailable("triton")
    if reason:
        raise UserError(f"the Triton scan cannot run here: {reason}")


def measure(options: argparse.Namespace) -> bool:
    """Check, then time, writing the figures as it goes; return whether every check is green."""
    require_triton()
    figures = Figures(options.out / "selective_scan.json")
    figures.add(checks=checks_of(check, AS_TIMED if options.timed_forms_only else CHECKED + AS_TIMED))
    if figures.green:
        extension, times = mamba_ssm_or_reason(options.mamba_ssm_source), {}
        figures.add(repeats=REPEATS, calls=CALLS, copy_bytes_per_second=copy_bandwidth())
        figures.add(mamba_ssm=extension if isinstance(extension, str) else "timed")
        for name, shape in SHAPES.items():
            times[name] = timed(shape, extension)
            figures.add(milliseconds=times)
            figures.add(bars=bars(figures.parts))
    peer = [f"mamba-ssm: {figures.parts['mamba_ssm']}"] if figures.green else []
    figures.show(times_of(figures.parts), [verdict_on(bar) for bar in figures.parts.get("bars", [])] + peer)
    return figures.green


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code (``run_script``)."""
    return run_script("globalmamba", __doc__.split("\n")[0], measure, GPU_ROWS, arguments, workers=4)


if __name__ == "__main__":
    sys.exit(main())
