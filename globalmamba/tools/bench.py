"""What this paper promises about speed: the selective scan on every backend, and the serialization.

    python -m globalmamba.tools.bench [--threads 2] [--repeat 5] [--lengths 196 784 3136]

Times are medians of interleaved repeats on this machine's CPU, float32; the backends of a GPU are measured by
``make gpu-evidence``. Extra memory is the rise of the peak of
resident memory in a process of its own, in tensors of the size of u. The scan is batch 8, width 384, with
softplus, D and gate, as Vim-T calls it for one direction.
"""

import argparse
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from globalmamba.kernels.selective_scan import op, selective_scan
from globalmamba.tools.bench_serialization import PASSES, measure_serialization
from shared.bench.measure import interleaved, peak_bytes

BATCH, WIDTH = 8, 384
BACKENDS = ("reference", "chunked", "cpu", "triton", "mamba_ssm")


def scan_arguments(length: int, state: int, batch: int = BATCH, width: int = WIDTH) -> dict:
    """Return inputs of a scan by name, channels first, float32, requiring gradients."""
    draw = torch.Generator().manual_seed(0)
    in_time = {name: torch.randn(batch, width, length, generator=draw) for name in ("u", "delta", "z")}
    matrices = {name: torch.randn(batch, state, length, generator=draw) for name in ("B", "C")}
    vectors = {name: torch.randn(width, generator=draw) for name in ("D", "delta_bias")}
    arguments = in_time | matrices | vectors | {"A": -torch.rand(width, state, generator=draw)}
    return {name: tensor.requires_grad_() for name, tensor in arguments.items()}


def forward_call(backend: str, length: int, state: int):
    """Return a call that runs the scan forward without keeping anything for a gradient."""
    arguments = {name: tensor.detach() for name, tensor in scan_arguments(length, state).items()}
    return lambda: selective_scan(**arguments, delta_softplus=True, backend=backend)


def training_call(backend: str, length: int, state: int):
    """Return a call that runs the scan forward and backward to every argument."""
    arguments = scan_arguments(length, state)
    dy = torch.ones_like(arguments["u"])

    def call():
        y = selective_scan(**arguments, delta_softplus=True, backend=backend)
        return torch.autograd.grad(y, list(arguments.values()), dy)

    return call


CALLS = {"forward": forward_call, "forward + backward": training_call}


def runs_here(backend: str) -> bool:
    """Return whether a backend takes tensors on this machine's CPU."""
    return backend not in ("triton", "mamba_ssm") and not op._unavailable(backend)


def extra_tensors(backend: str, length: int, state: int) -> str:
    """Return the rise of the peak of memory in training, in tensors of u's size; Linux alone tells."""
    try:
        return f"{peak_bytes(training_call, backend, length, state) / (BATCH * WIDTH * length * 4):.1f}"
    except OSError:
        return "–"


def scan_times(length: int, state: int, repeats: int, backends=BACKENDS) -> dict[str, dict[str, float]]:
    """Return for forward, and forward + backward, the median seconds of every backend that runs here."""
    running = [name for name in backends if runs_here(name)]
    return {
        what: interleaved({name: call(name, length, state) for name in running}, repeats)
        for what, call in CALLS.items()
    }


def scan_table(lengths: list[int], repeats: int) -> Table:
    """Return the table of all backends, N = 16 at every length and N = 1 at the second of them."""
    table = Table("L", "N", "backend", title=f"selective scan, batch {BATCH}, width {WIDTH}, float32")
    for what in CALLS:
        table.add_column(f"{what}, ms", justify="right")
        table.add_column("x loop", justify="right")
    table.add_column("extra tensors in training", justify="right")
    for length, state in [(length, 16) for length in lengths] + [(lengths[len(lengths) // 2], 1)]:
        times = scan_times(length, state, repeats)
        for name in times["forward"]:
            cells = [str(length), str(state), name]
            for what in CALLS:
                cells.append(f"{times[what][name] * 1e3:.1f}")
                cells.append(f"{times[what]['reference'] / times[what][name]:.1f}")
            table.add_row(*cells, extra_tensors(name, length, state))
        table.add_section()
    for name in BACKENDS:
        if not runs_here(name):
            table.add_row("", "", name, "not here")
    return table


def serialization_table(repeats: int, threads: int) -> Table:
    """Return the table of the serialization, the released way first, at 32 x 3 x 224 x 224 and width 192."""
    table = Table("way", title="serialization, batch 32, 224 x 224, patches of 16, width 192, float32")
    for of in PASSES:
        table.add_column(f"{of}, ms", justify="right")
        table.add_column("x released", justify="right")
    table.add_column("relative error to released", justify="right")
    results = measure_serialization(repeats=repeats, threads=threads)
    for way, measured in results.items():
        cells = [way]
        for of in PASSES:
            cells += [f"{measured[of]:.0f}", f"{results['released'][of] / measured[of]:.1f}"]
        table.add_row(*cells, f"{measured['error']:.1e}")
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m globalmamba.tools.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[196, 784, 3136])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(f"{platform.machine()} {capability}, {args.threads} threads, torch {torch.__version__}")
    console.print(scan_table(args.lengths, args.repeat))
    for name in BACKENDS:
        if not runs_here(name):
            why = op._unavailable(name) or "takes no tensors on a CPU"
            console.print(f"{name}: {why.rstrip('.')}; make gpu-evidence measures it.", markup=False)
    console.print(serialization_table(args.repeat, args.threads))


if __name__ == "__main__":
    main()
