"""What only a GPU can show of the scan of a grid: that its Triton form is right there, then how fast it is.

    make gpu-evidence OUT=FOLDER [MAMBA_SSM=FOLDER] [DATA_ROOT=FOLDER]
    python -m v2m.tools.gpu_evidence --out FOLDER [--mamba-ssm-source FOLDER] [--data-root FOLDER] [--workers 4]

First every case is checked against the definition in float64, outputs and all gradients, in fresh memory that holds
NaN. Only if all of them hold is anything timed: a pass over 14 x 14 tokens beside mamba-ssm's CUDA scan of the same
rows as sequences, and V2M's whole mixer beside the release's composition on that scan, where mamba-ssm is installed or
its source folder is given (compiled for this GPU alone; needs nvcc and ninja), in turn. All of it goes into
``FOLDER/scan2d.json``, which is written anew after every part. With a data root the lite rows meant for a GPU are
trained afterwards, by several processes that share them. Exit code 1 where a check is red or a training failed, 2
without a GPU; a bar that is missed is a result and changes no exit code.
"""

import argparse
import sys

import torch
from rich.table import Table
from torch import Tensor

from shared.bench.gpu import CALLS, REPEATS, Figures, milliseconds, require_gpu, run_script, worst_of
from shared.errors import UserError
from v2m.kernels.scan2d import op, scan2d
from v2m.mixer import ReleasedMixer, V2MMixer
from v2m.tools.released_composition import released_composition
from v2m.tools.scan_evidence import checks_of, mamba_ssm_or_reason, verdict_on

# Relative L2 error: half a unit in the last place of the outputs' type, and float32's drift over the sums.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
ROWS, COLUMNS = ("right", "left") * 2, ("down", "up") * 2
KINDS = {"rows": ("variable", None), "columns": (None, "variable"), "both": ("variable", "variable")}
# batch, width, H, W, N, directions, kinds: V2M-S's passes in training, Vim-S's two directions, a large image.
SHAPES = {
    "V2M-S, rows": (128, 768, 14, 14, 16, ROWS, "rows"),
    "V2M-S, columns": (128, 768, 14, 14, 16, COLUMNS, "columns"),
    "Vim-S": (128, 768, 1, 197, 16, ("right", "left"), "both"),
    "800 x 1333, columns": (2, 768, 50, 83, 16, COLUMNS, "columns"),
}
BARS = {"V2M-S, rows": (10.0, 8.0), "V2M-S, columns": (10.0, 8.0)}  # times mamba-ssm's speed, forward and backward
MIXER = (64, 384, 14)  # images on a GPU, embed_dim and side of V2M-S
MIXER_BAR = 3.0  # times the speed of the release's composition, forward and backward together
GPU_ROWS = tuple(prefix + data for data in ("cifar10-all", "tiny32", "imagenette") for prefix in ("", "v2m-"))
DEVICE = "cuda"


def case(height, width, state, dtype, directions, kinds, channels=48, shared=False) -> dict:
    """Return a case to check; ``shared``: all groups read one u."""
    names = ("height", "width", "state", "dtype", "directions", "kinds", "channels", "shared")
    return dict(zip(names, (height, width, state, dtype, directions, kinds, channels, shared), strict=True))


ALL = ("right", "left", "down", "up")
CHECKED = [
    case(height, width, state, dtype, ALL, kinds)
    for height, width, state in ((1, 1, 16), (2, 7, 1), (14, 14, 16), (31, 28, 5), (56, 3, 16), (1, 197, 64))
    for dtype in BOUND
    for kinds in KINDS
]
# As VMamba's four scans read one image.
CHECKED += [case(7, 9, 16, torch.bfloat16, ALL, "both", shared=True)]
# What the timed shapes are made of: whole blocks of channels, several of them.
AS_TIMED = [
    case(height, width, state, torch.bfloat16, directions, kinds, channels)
    for _, channels, height, width, state, directions, kinds in SHAPES.values()
]


def inputs(batch: int, channels: int, height: int, width: int, state: int, dtype, groups: int, kinds) -> dict:
    """Return arguments of a scan by name on the GPU, channels last."""
    generator = torch.Generator(DEVICE).manual_seed(height * 64 + state)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    def grid(count: int) -> Tensor:
        return draw(batch, groups, height, width, count).to(dtype).permute(0, 1, 4, 2, 3)

    chosen = {name: grid(state) for name, kind in zip("BC", KINDS[kinds], strict=True) if kind}
    fixed = {"A": -draw(groups, channels, state).abs(), "delta_bias": draw(groups, channels)}
    return {"u": grid(channels), "delta": grid(channels)} | chosen | fixed


def outcome(arguments: dict[str, Tensor], dy: Tensor, directions, backend: str) -> dict[str, Tensor]:
    """Return y and the gradient to every argument."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    y = scan2d(**leaves, directions=directions, delta_softplus=True, backend=backend)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check(height, width, state, dtype, directions, kinds, channels, shared) -> dict:
    """Return the case with its largest relative error, where that was, and whether it is within the bound."""
    arguments = inputs(2, channels, height, width, state, dtype, len(directions), kinds)
    if shared:
        arguments["u"] = arguments["u"][:, :1].expand_as(arguments["u"])
    dy = torch.randn(arguments["u"].shape, device=DEVICE).to(dtype)
    exact = {name: tensor.double() for name, tensor in arguments.items()}
    wanted = outcome(exact, dy, directions, "reference")
    first, again = (outcome(arguments, dy, directions, "triton") for _ in range(2))
    errors = {
        name: float((first[name].double() - value).norm() / value.norm().clamp_min(1e-30))
        for name, value in wanted.items()
    }
    worst = worst_of(errors)
    repeatable = all(torch.equal(first[name], again[name]) for name in first)
    green = errors[worst] <= BOUND[dtype] and repeatable
    checked = case(height, width, state, str(dtype), directions, kinds, channels, shared)
    return checked | {"worst": worst, "error": errors[worst], "repeatable": repeatable, "green": green}


def sequences(grid: Tensor, columns: bool) -> Tensor:
    """(batch, K, C, H, W) -> (K batch lines, C, steps), contiguous: what mamba-ssm is given of rows or columns."""
    lines = grid.transpose(3, 4) if columns else grid
    return lines.permute(1, 0, 3, 2, 4).flatten(0, 2).contiguous()


def peer_arguments(arguments: dict[str, Tensor], columns: bool) -> list:
    """Return what mamba-ssm's forward takes: all groups' lines in one batch, which share A and bias of the first."""
    tensors = {name: sequences(arguments[name], columns) for name in ("u", "delta", "B", "C") if name in arguments}
    A, bias = arguments["A"][0].contiguous(), arguments["delta_bias"][0].contiguous()
    B, C = (tensors[name][:, None] if name in tensors else torch.ones_like(A) for name in "BC")
    return [tensors["u"], tensors["delta"], A, B, C, None, None, bias]


def timed(shape: tuple, extension) -> dict:
    """Return forward and backward times of a shape in bfloat16, of mamba-ssm's too where it is there."""
    batch, channels, height, width, state, directions, kinds = shape
    scan = op._module("triton")
    arguments = inputs(batch, channels, height, width, state, torch.bfloat16, len(directions), kinds)
    ordered = [arguments.get(name) for name in ("u", "delta", "A", "B", "C", "delta_bias")]
    dy = torch.randn_like(arguments["u"])
    _, saved = scan.forward(*ordered, True, directions, True)
    forwards = {"triton": lambda: scan.forward(*ordered, True, directions, True)}
    backwards = {"triton": lambda: scan.backward(dy, *ordered, saved, True, directions)}
    if not isinstance(extension, str):
        columns = directions[0] in ("down", "up")
        peers, gradient = peer_arguments(arguments, columns), sequences(dy, columns)
        out, states, *_ = extension.fwd(*peers, True)
        forwards["mamba-ssm"] = lambda: extension.fwd(*peers, True)
        backwards["mamba-ssm"] = lambda: extension.bwd(*peers, gradient, states, None, None, True, False)
    return {"forward": milliseconds(forwards), "backward": milliseconds(backwards)}


class PeerScan(torch.autograd.Function):
    """mamba-ssm's scan of sequences with its own backward."""

    @staticmethod
    def forward(ctx, extension, *tensors):
        out, states, *_ = extension.fwd(*tensors[:5], None, None, tensors[5], True)
        ctx.extension = extension
        ctx.save_for_backward(*tensors, states)
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, bias, states = ctx.saved_tensors
        options = (dout.contiguous(), states, None, None, True, False)
        gradients = ctx.extension.bwd(*tensors, None, None, bias, *options)
        return None, *gradients[:5], gradients[6]


def peer_pass(extension):
    """Return a pass over sequences on mamba-ssm's scan, for ``released_composition``."""

    def one_pass(mixer: ReleasedMixer, x: Tensor, suffix: str, chosen: str) -> Tensor:
        u, delta, matrices, _ = mixer.selection(x.contiguous()[:, None, None], ("right",), (suffix,), chosen)
        A = -torch.exp(getattr(mixer, f"A{suffix}_log").float())
        # (M, 1, N, 1, L) -> (M, 1, N, L); a constant one is a matrix of ones to it.
        pair = [matrices[n][:, :, :, 0].contiguous() if n in matrices else torch.ones_like(A) for n in "BC"]
        grids = (t[:, 0, 0].transpose(1, 2).contiguous() for t in (u, delta.to(u.dtype)))
        bias = getattr(mixer, f"dt_proj{suffix}").bias.float()
        y = PeerScan.apply(extension, *grids, A, *pair, bias).transpose(1, 2)
        return torch.addcmul(y, u[:, 0, 0], getattr(mixer, f"D{suffix}").to(u.dtype))

    return one_pass


def timed_mixers(extension) -> dict:
    """Return the times, forward and backward together in bfloat16 autocast, of V2M's mixer and the release's."""
    batch, width, side = MIXER
    ours, theirs = (kind(width).to(DEVICE) for kind in (V2MMixer, ReleasedMixer))
    grid = torch.randn(batch, side, side, width, device=DEVICE, requires_grad=True)
    forms = {
        "V2M, four true corners": (ours, lambda: ours(grid)),
        "release's composition, our scan": (theirs, lambda: released_composition(theirs, grid)),
    }
    if not isinstance(extension, str):
        one_pass = peer_pass(extension)
        forms["release's composition, mamba-ssm"] = (theirs, lambda: released_composition(theirs, grid, one_pass))

    def both(mixer, compute):
        with torch.autocast(grid.device.type, torch.bfloat16):
            y = compute()
        return torch.autograd.grad(y, [grid, *mixer.parameters()], torch.ones_like(y))

    return milliseconds({name: lambda f=form: both(*f) for name, form in forms.items()})


def bars(figures: dict) -> list[dict]:
    """Return what was promised of each shape beside what was measured."""
    rows = []
    for shape, wanted in BARS.items():
        for of, bar in zip(("forward", "backward"), wanted, strict=True):
            medians = {n: time["median"] for n, time in figures["milliseconds"].get(shape, {}).get(of, {}).items()}
            if "mamba-ssm" in medians:
                ratio = medians["mamba-ssm"] / medians["triton"]
                rows.append({"bar": f"{shape}, {of}: times mamba-ssm", "wanted": bar, "measured": ratio})
    medians = {name: time["median"] for name, time in figures.get("mixers", {}).items()}
    for name in medians:
        if name.startswith("release's") and name.endswith("mamba-ssm"):
            ratio = medians[name] / medians["V2M, four true corners"]
            rows.append({"bar": f"mixer: times {name}", "wanted": MIXER_BAR, "measured": ratio})
    return [row | {"holds": row["measured"] >= row["wanted"]} for row in rows]


def times_of(figures: dict) -> Table:
    table = Table("shape", "pass", "form", "ms, median", "least", "largest")
    passes = {
        (shape, of): forms for shape, both in figures.get("milliseconds", {}).items() for of, forms in both.items()
    }
    passes |= {("mixer of V2M-S", "forward + backward"): figures["mixers"]} if "mixers" in figures else {}
    for (shape, of), forms in passes.items():
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
    figures = Figures(options.out / "scan2d.json")
    figures.add(checks=checks_of(check, AS_TIMED if options.timed_forms_only else CHECKED + AS_TIMED))
    if figures.green:
        extension, times = mamba_ssm_or_reason(options.mamba_ssm_source), {}
        figures.add(repeats=REPEATS, calls=CALLS)
        figures.add(mamba_ssm=extension if isinstance(extension, str) else "timed")
        for name, shape in SHAPES.items():
            times[name] = timed(shape, extension)
            figures.add(milliseconds=times)
            figures.add(bars=bars(figures.parts))
        figures.add(mixers=timed_mixers(extension))
        figures.add(bars=bars(figures.parts))
    peer = [f"mamba-ssm: {figures.parts['mamba_ssm']}"] if figures.green else []
    figures.show(times_of(figures.parts), [verdict_on(bar) for bar in figures.parts.get("bars", [])] + peer)
    return figures.green


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code (``run_script``)."""
    return run_script("v2m", __doc__.split("\n")[0], measure, GPU_ROWS, arguments, workers=4)


if __name__ == "__main__":
    sys.exit(main())
