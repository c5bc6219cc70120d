"""What this paper promises about speed: the scans of a grid on every backend, the whole mixer beside the release's.

    python -m v2m.tools.bench [--threads 2] [--repeat 5] [--sides 14 28 56]

Times are medians of interleaved repeats on this machine's CPU, float32; the backends of a GPU are measured by
``make gpu-evidence``. Extra memory is the rise of the peak of resident memory in a process of its own, in tensors of
the size of u. The scan is 2 images, 4 directions, width 384, N = 16: the rows with B chosen and C = 1, then the columns
with B = 1 and C chosen, as one mixer calls them. "composition" is what ordinary operators make of that, each direction
flipped and transposed by copies (kernels/scan2d/composition.py). Roesser's recurrence is timed by diagonals beside its
definition, token by token, with as many images as the mixer has corners for 2 images, B1 and C2 chosen by the token.
"""

import argparse
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from shared.bench.measure import interleaved, peak_bytes
from v2m.kernels.roesser import roesser_scan
from v2m.kernels.scan2d import composition, op, scan2d
from v2m.mixer import ReleasedMixer, V2MMixer
from v2m.tools.released_composition import released_composition

BATCH, GROUPS, WIDTH, STATE = 2, 4, 384, 16
BACKENDS = ("composition", "reference", "chunked", "cpu", "triton", "mamba_ssm")
ROWS, COLUMNS = ("right", "left") * 2, ("down", "up") * 2
RECURRENCE = ("reference", "wavefront")  # backends of Roesser's recurrence
FASTEST = "V2M, four true corners"
# What computes: the release's composition, the same sums in place, V2M's mixer; and on which scan.
MIXERS = {
    "release's composition, plain loop": (ReleasedMixer, released_composition, "reference"),
    "release's composition": (ReleasedMixer, released_composition, "auto"),
    "release's sums, in place": (ReleasedMixer, lambda mixer, grid: mixer(grid), "auto"),
    FASTEST: (V2MMixer, lambda mixer, grid: mixer(grid), "auto"),
}


def passes(height: int, width: int) -> list[tuple[dict, tuple[str, ...]]]:
    """Return the arguments of a row pass and of a column pass by name, requiring gradients, and their directions."""
    draw = torch.Generator().manual_seed(0)

    def grid(channels: int) -> torch.Tensor:
        return torch.randn(BATCH, GROUPS, height, width, channels, generator=draw).permute(0, 1, 4, 2, 3)

    cases = []
    for chosen, directions in (("B", ROWS), ("C", COLUMNS)):
        arguments = {
            "u": grid(WIDTH),
            "delta": grid(WIDTH),
            "A": -torch.rand(GROUPS, WIDTH, STATE, generator=draw),
            chosen: grid(STATE),
            "delta_bias": torch.randn(GROUPS, WIDTH, generator=draw),
        }
        cases.append(({name: tensor.requires_grad_() for name, tensor in arguments.items()}, directions))
    return cases


def run(backend: str, arguments: dict, directions: tuple[str, ...]) -> torch.Tensor:
    """Run one pass."""
    if backend == "composition":
        named = {name: arguments.get(name) for name in ("u", "delta", "A", "B", "C", "delta_bias")}
        return composition.scan(*named.values(), True, directions)
    return scan2d(**arguments, directions=directions, delta_softplus=True, backend=backend)


def forward_call(backend: str, height: int, width: int):
    """Return a call that runs both passes forward without keeping anything for a gradient."""
    both = passes(height, width)

    def call():
        with torch.no_grad():
            return [run(backend, *arguments) for arguments in both]

    return call


def training_call(backend: str, height: int, width: int):
    """Return a call that runs both passes forward and backward to every argument."""
    both = passes(height, width)
    dy = torch.ones_like(both[0][0]["u"])

    def call():
        return [torch.autograd.grad(run(backend, *arguments), list(arguments[0].values()), dy) for arguments in both]

    return call


CALLS = {"forward": forward_call, "forward + backward": training_call}


def runs_here(backend: str) -> bool:
    """Return whether a backend takes tensors on this machine's CPU."""
    if backend == "composition":
        return True
    return backend not in ("triton", "mamba_ssm") and not op._unavailable(backend)


def extra_tensors(backend: str, height: int, width: int) -> str:
    """Return the rise of the peak of memory in training, in tensors of u's size; Linux alone tells."""
    size = BATCH * GROUPS * WIDTH * height * width * 4
    try:
        return f"{peak_bytes(training_call, backend, height, width) / size:.1f}"
    except OSError:
        return "–"


def scan_times(height: int, width: int, repeats: int, backends=BACKENDS) -> dict[str, dict[str, float]]:
    """Return for forward, and forward + backward, the median seconds of every backend that runs here."""
    running = [name for name in backends if runs_here(name)]
    return {
        what: interleaved({name: call(name, height, width) for name in running}, repeats)
        for what, call in CALLS.items()
    }


def scan_table(sizes: list[tuple[int, int]], repeats: int) -> Table:
    """Return the table of all backends at every size."""
    title = f"a row pass and a column pass, {BATCH} images, {GROUPS} directions, width {WIDTH}, N {STATE}, float32"
    table = Table("grid", "backend", title=title)
    for what in CALLS:
        table.add_column(f"{what}, ms", justify="right")
        table.add_column("x composition", justify="right")
    table.add_column("extra tensors in training", justify="right")
    for size in sizes:
        times = scan_times(*size, repeats)
        for name in times["forward"]:
            cells = ["{} x {}".format(*size), name]
            for what in CALLS:
                cells.append(f"{times[what][name] * 1e3:.1f}")
                cells.append(f"{times[what]['composition'] / times[what][name]:.1f}")
            table.add_row(*cells, extra_tensors(name, *size))
        table.add_section()
    for name in BACKENDS:
        if not runs_here(name):
            table.add_row("", name, "not here")
    return table


def recurrence_call(backend: str, height: int, width: int, train: bool):
    """Return a call that runs Roesser's recurrence as its mixer does, forward or forward and backward."""
    draw = torch.Generator().manual_seed(0)

    def grid(channels: int) -> torch.Tensor:
        return torch.randn(BATCH * GROUPS, height, width, channels, generator=draw).permute(0, 3, 1, 2)

    arguments = {"x": grid(WIDTH), "delta1": 0.1 * grid(WIDTH).abs(), "delta2": 0.1 * grid(WIDTH).abs()}
    arguments |= {name: -torch.rand(WIDTH, STATE, generator=draw) for name in ("A1", "A4")}
    # Small couplings, as nothing else bounds the states.
    arguments |= {n: 0.1 * torch.randn(WIDTH, STATE, generator=draw) for n in ("p2", "q2", "p3", "q3", "B2", "C1")}
    arguments |= {"B1": grid(STATE), "C2": grid(STATE)}
    arguments = {name: tensor.requires_grad_(train) for name, tensor in arguments.items()}
    dy = torch.ones_like(arguments["x"])

    def call():
        y = roesser_scan(**arguments, backend=backend)
        return torch.autograd.grad(y, list(arguments.values()), dy) if train else y

    return call


def recurrence_table(height: int, width: int, repeats: int) -> Table:
    """Return the table of Roesser's recurrence, its definition first."""
    title = f"Roesser's recurrence, {BATCH * GROUPS} images, {height} x {width}, width {WIDTH}, N {STATE}, float32"
    table = Table("backend", title=title)
    cells = {name: [name] for name in RECURRENCE}
    for what, train in zip(CALLS, (False, True), strict=True):
        table.add_column(f"{what}, ms", justify="right")
        table.add_column("x reference", justify="right")
        calls = {name: recurrence_call(name, height, width, train) for name in RECURRENCE}
        times = interleaved(calls, repeats)
        for name in RECURRENCE:
            cells[name] += [f"{times[name] * 1e3:.1f}", f"{times['reference'] / times[name]:.1f}"]
    for line in cells.values():
        table.add_row(*line)
    return table


def mixer_call(name: str, side: int, batch: int, train: bool):
    """Return a call that runs a mixer of ``MIXERS`` on a square grid, forward or forward and backward."""
    kind, compute, backend = MIXERS[name]
    torch.manual_seed(0)
    mixer = kind(WIDTH // 2, state_dim=STATE, backend=backend)
    grid = torch.randn(batch, side, side, WIDTH // 2, requires_grad=train)
    leaves = [grid, *mixer.parameters()]
    dy = torch.ones_like(grid)

    def call():
        if train:
            return torch.autograd.grad(compute(mixer, grid), leaves, dy)
        with torch.no_grad():
            return compute(mixer, grid)

    return call


def mixer_peak(name: str, side: int, batch: int) -> str:
    """Return the rise of the peak of memory in training, in MB; Linux alone tells."""
    try:
        return f"{peak_bytes(mixer_call, name, side, batch, True) / 1e6:.0f}"
    except OSError:
        return "–"


def mixer_table(side: int, batch: int, repeats: int) -> Table:
    """Return the table of whole mixers, the release's composition with a plain loop first."""
    title = f"whole mixer, batch {batch}, {side} x {side}, embed_dim {WIDTH // 2}, N {STATE}, float32"
    table = Table("mixer", title=title)
    for what in CALLS:
        table.add_column(f"{what}, ms", justify="right")
        table.add_column("x release, loop", justify="right")
        table.add_column("x release", justify="right")
    table.add_column("memory in training, MB", justify="right")
    times = {
        what: interleaved({name: mixer_call(name, side, batch, train) for name in MIXERS}, repeats)
        for what, train in zip(CALLS, (False, True), strict=True)
    }
    loop, release = list(MIXERS)[:2]
    for name in MIXERS:
        cells = [name]
        for measured in times.values():
            cells.append(f"{measured[name] * 1e3:.1f}")
            cells += [f"{measured[other] / measured[name]:.1f}" for other in (loop, release)]
        table.add_row(*cells, mixer_peak(name, side, batch))
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m v2m.tools.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[14, 28, 56])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a pipe has no width
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(f"{platform.machine()} {capability}, {args.threads} threads, torch {torch.__version__}")
    # One grid that is not square: nothing here needs it to be.
    sizes = [(side, side) for side in args.sides] + [(args.sides[0] // 2, 2 * args.sides[0])]
    console.print(scan_table(sizes, args.repeat))
    for name in BACKENDS:
        if not runs_here(name):
            why = op._unavailable(name) or "takes no tensors on a CPU"
            console.print(f"{name}: {why.rstrip('.')}; make gpu-evidence measures it.", markup=False)
    console.print(recurrence_table(args.sides[0], args.sides[0], args.repeat))
    console.print(mixer_table(args.sides[0], 8, args.repeat))


if __name__ == "__main__":
    main()
