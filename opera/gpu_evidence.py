"""What only a GPU can show of OPERA: views and objectives are right there, what a pre-training step costs, the lite rows.

    make gpu-evidence OUT=FOLDER [DATA_ROOT=FOLDER]
    python -m opera.gpu_evidence --out FOLDER [--data-root FOLDER] [--workers 16]

First the operations of the views are compared with torchvision's in float64 on the CPU, whole views with those that the
CPU makes of the same key, and every arrangement's objective and gradients with float64 on the CPU. Only if all of that
holds is anything timed: a whole step, from uint8 images on the GPU to the moved momentum encoder, as training takes it
(module.py, what guards it against numbers that are not finite included), in bfloat16 autocast with a fused optimiser,
beside the plain composition (plain.py), which gets views that are there already. With its own views it is as fast as
the slower of that and of what all processor cores make of views, as if the two overlapped perfectly. Compilation comes
last and not after COMPILE_UNTIL. All figures go into ``FOLDER/opera.json``, which is written anew after every part. With
a data root the lite rows meant for a GPU are trained afterwards, by several processes that share them. Exit code 1
where a check is red or a training failed, 2 without a GPU; a bar that is missed is a result and changes no exit code.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as exact

from opera import views
from opera.hierarchy import Hierarchy
from opera.module import PretrainingModule
from opera.plain import plain_batch, plain_momentum, plain_objective, plain_views
from opera.train import build_hierarchy
from opera.views import Views
from shared.errors import UserError
from shared.metrics.record import environment, git_state
from shared.run.config import compose, repository_root, row_config
from shared.run.gpu import require_gpu, train_rows, write_figures
from shared.run.machine import synchronise

DEVICE, COMPILER = "cuda", "inductor"
GPU_ROWS = ("cifar10-all", "tiny32", "imagenette")
# row, images in a batch, pixels of their side: crops of 224 pixels come from images of 256
NETWORKS = {
    "ViT-S, 224 px": ("opera-lin-vit-s-150-top", 128, 256),
    "ResNet-50, 224 px": ("opera-lin-r50-150-top", 128, 256),
    "ResNet-small, 32 px": ("cifar10-all-opera", 1024, 32),
}
VIEW_BOUND = 1e-4  # largest difference of a pixel
BOUND = 1e-4  # relative L2 error of the objective and of a gradient in float32
SMALLEST = 1e-3  # of the largest gradient's length: errors of smaller gradients are relative to this
VIEWS_CHECKED = ("small", "resnet", "vit")
OBJECTIVES = ("opera", "one-space", "class-on-backbone", "parallel", "moco-v3", "supervised", "supcon")
MASKED = ("mae", "opera-mae")
PRINTED = ["objective.loss_weights=printed", "objective.denominator=others"]
REPEATS, WARM_UP, STEPS = 5, 2, 2  # measurements in turn, those before that do not count, steps in one
COMPILE_UNTIL = 40.0  # seconds of timing after which no compilation begins
WORKERS = os.cpu_count() or 1  # processes that make views
PORTION, ROUNDS = 2**20, 4  # pixels of which a process makes views at a time; how often each does
MOMENTUM, BAR = 0.99, 1.5  # of the momentum encoder; times the speed of the plain composition
OURS, COMPILED = "ours, bfloat16", "ours, bfloat16, compiled"
PLAIN = {"plain, float32": None, "plain, bfloat16": torch.bfloat16}
OWN_VIEWS = ", its views on the CPU"


def noise(count: int, side: int) -> Tensor:
    """Return images uint8 (count, 3, side, side)."""
    draw = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8)


def operations(size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for every operation on images what the GPU makes in float32 and what torchvision makes in float64."""
    images = noise(4, 40)
    boxes = np.array([[0, 0, 40, 40], [3, 5, 10, 30], [20, 1, 17, 9], [39, 35, 1, 1]])
    pixels, bytes_there = images.double() / 255, images.to(DEVICE)
    there, numbers = bytes_there.float() / 255, np.array([0.6, 1.0, 1.4, 0.9])
    wanted = [
        exact.resized_crop(p, *box, [size, size], antialias=True)
        for p, box in zip(pixels, boxes.tolist(), strict=True)
    ]
    found = {"crop": (views.crop(bytes_there, boxes, size), torch.stack(wanted))}
    changes = {
        "brightness": (views.brightness, exact.adjust_brightness, numbers),
        "contrast": (views.contrast, exact.adjust_contrast, numbers),
        "saturation": (views.saturation, exact.adjust_saturation, numbers),
        "hue": (views.hue, exact.adjust_hue, (numbers - 1) / 4),
    }
    for name, (ours, theirs, factors) in changes.items():
        given = torch.tensor(factors, dtype=torch.float32, device=DEVICE).view(-1, 1, 1, 1)
        wanted = [theirs(p, factor) for p, factor in zip(pixels, factors.tolist(), strict=True)]
        found[name] = (ours(there, given), torch.stack(wanted))
    found["grey"] = (views.grey(there), exact.rgb_to_grayscale(pixels, 3))
    sigma = np.array([0.1, 0.7, 1.3, 2.0])
    wanted = [exact.gaussian_blur(p, [13, 13], [s, s]) for p, s in zip(pixels, sigma.tolist(), strict=True)]
    found["blur"] = (views.blurred(there, sigma, 2.0), torch.stack(wanted))
    return found


def check_views() -> list[dict]:
    """Return every operation, and both whole views of every config, with the largest difference of a pixel."""
    found = operations(24)
    for name in VIEWS_CHECKED:
        data = "cifar10-jpg" if name == "small" else "imagenet1k"
        make = Views(compose("opera", [f"views={name}", f"data={data}", "augment=small"]).views)
        images, key = noise(6, make.cfg.image_size + 8), (0, 1, np.arange(6))
        for view in (0, 1):
            pair = make(images.to(DEVICE), key, view), make(images, key, view)
            found[f"{name}, view {view + 1}"] = pair
    checks = []
    for name, (one, other) in found.items():
        error = float((one.cpu().double() - other.double()).abs().max())
        checks.append({"what": f"views: {name}", "error": error, "green": error <= VIEW_BOUND})
    return checks


def cases() -> list[tuple[str, str, list[str]]]:
    """Return (objective, network, overrides) of all that is compared: every arrangement on all that it takes."""
    found = [(one, network, []) for one in OBJECTIVES for network in ("resnet-small", "vit-tiny")]
    found += [(one, "vit-tiny", ["objective.mask.width=64", "objective.mask.depth=2"]) for one in MASKED]
    return [*found, ("opera", "vit-tiny", PRINTED)]


def outcome(model: Hierarchy, first: Tensor, second: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the objective and the gradient to every parameter that trains."""
    total = model(first, second, labels, (0, 0, np.arange(len(labels)))).total
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"objective": total.detach()} | gradients


def check_objective(objective: str, network: str, overrides: list[str]) -> dict:
    """Return the case with its largest relative error against float64 on the CPU."""
    heads = "small-vit" if network.startswith("vit") else "small"
    given = ["data=cifar10-jpg", "data.image_size=16", f"model={network}", f"heads={heads}"]
    cfg = compose("opera", [*given, f"objective={objective}", *overrides])
    model = build_hierarchy(cfg).train()
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 24, 3, 16, 16, generator=draw)
    labels = (torch.arange(24) % 5).where(torch.arange(24) % 6 > 0, -1)
    wanted = outcome(copy.deepcopy(model).double(), first.double(), second.double(), labels)
    # TensorFloat-32, which convolutions take by default, has three digits.
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = outcome(model.to(DEVICE), *(one.to(DEVICE) for one in (first, second, labels)))
    largest = max(float(value.norm()) for name, value in wanted.items() if name != "objective")
    errors = {}
    for name, value in wanted.items():
        length = value.norm() if name == "objective" else value.norm().clamp_min(SMALLEST * largest)
        errors[name] = float((found[name].cpu().double() - value).norm() / length)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    case = {"what": ", ".join([objective, network, *overrides]), "worst": worst, "error": errors[worst]}
    return case | {"green": errors[worst] <= BOUND and found.keys() == wanted.keys()}


def batch_of(cfg, count: int, side: int) -> dict[str, Tensor]:
    """Return a batch as training has it on the GPU."""
    found = {"images": noise(count, side), "labels": torch.arange(count) % cfg.data.classes}
    found |= {"indices": torch.arange(count), "epoch": torch.tensor(0)}
    return {name: value.to(DEVICE) for name, value in found.items()}


def compiled(backbone: nn.Module) -> None:
    """Compile a backbone in place; of a ViT the block that all its blocks are, which takes a tenth of the time."""
    for part in backbone.blocks if isinstance(backbone, VisionTransformer) else [backbone]:
        part.compile(backend=COMPILER)


class OurStep:
    """The step that trains, in bfloat16 autocast with a fused optimiser where PyTorch has one."""

    def __init__(self, cfg, count: int, side: int, compiles: bool):
        self.module = PretrainingModule(build_hierarchy(cfg), Views(cfg.views), cfg, 1000).to(DEVICE).train()
        if compiles:
            for encoder in (self.module.model.online, self.module.model.momentum):
                compiled(encoder.backbone)
        self.batch, self.taken = batch_of(cfg, count, side), 0
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        for group in self.optimizer.param_groups:
            if "fused" in group:
                group["fused"] = True

    def __call__(self) -> None:
        self.module.on_train_batch_start(self.batch, self.taken)
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            self.module.last_loss = self.module.terms(self.batch).total
        self.optimizer.zero_grad()
        self.module.last_loss.backward()
        self.module.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.module.model.update_momentum(MOMENTUM)
        self.taken += 1


class PlainStep:
    """The plain composition of the same step, from views that are there already; ``dtype``: of autocast, or none."""

    def __init__(self, cfg, count: int, dtype: torch.dtype | None):
        module = PretrainingModule(build_hierarchy(cfg), Views(cfg.views), cfg, 1000)
        self.model = module.model.to(DEVICE, memory_format=torch.contiguous_format).train()
        self.optimizer, self.dtype = module.configure_optimizers()["optimizer"], dtype
        side = cfg.views.image_size
        self.first, self.second = torch.randn(2, count, 3, side, side, device=DEVICE)
        self.labels = torch.arange(count, device=DEVICE) % cfg.data.classes

    def __call__(self) -> None:
        with torch.autocast(torch.device(DEVICE).type, self.dtype, enabled=self.dtype is not None):
            total = plain_objective(self.model, self.first, self.second, self.labels)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        plain_momentum(self.model, MOMENTUM)


class ViewsMade(Dataset):
    """Both views of some images, made by plain.py in the process that asks; an item is how many images they were."""

    def __init__(self, cfg, side: int, items: int):
        self.views, self.items = plain_views(cfg.views), items
        self.images = noise(max(PORTION // side**2, 1), side)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, number: int) -> int:
        return len(plain_batch(self.views, self.images)[0])


def views_rate(cfg, side: int) -> float:
    """Return of how many images a second all processor cores make both views."""
    made = ViewsMade(cfg, side, max(WORKERS, 1) * (ROUNDS + 1))
    count, begin = 0, 0.0
    for number, images in enumerate(DataLoader(made, batch_size=None, num_workers=WORKERS)):
        count += images
        if number + 1 == max(WORKERS, 1):  # they have started
            count, begin = 0, time.perf_counter()
    return count / (time.perf_counter() - begin)


def seconds_in_turn(calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Return the seconds of one step of every form, of STEPS in a row, one form after the other."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + REPEATS):
        for name, call in calls.items():
            synchronise(torch.device(DEVICE))
            begin = time.perf_counter()
            for _ in range(STEPS):
                call()
            synchronise(torch.device(DEVICE))
            if turn >= WARM_UP:
                times[name].append((time.perf_counter() - begin) / STEPS)
    return times


def extra_bytes(step: OurStep | PlainStep) -> int | None:
    """Return how much more memory than before a step, gradients not held, it has at its peak; None on a CPU."""
    if torch.device(DEVICE).type != "cuda":
        return None
    step.optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def timed(steps: dict[str, OurStep | PlainStep], count: int) -> dict[str, dict]:
    """Return images a second, milliseconds and memory of every form of a step of ``count`` images."""
    found = {}
    for name, seconds in seconds_in_turn(steps).items():
        numbers = {"median": statistics.median(seconds), "least": min(seconds), "largest": max(seconds)}
        found[name] = {
            "images_per_second": count / numbers["median"],
            "extra_bytes": extra_bytes(steps[name]),
        }
        found[name]["milliseconds"] = {of: 1000 * one for of, one in numbers.items()}
    return found


def timed_forms(row: str, count: int, side: int) -> dict[str, dict]:
    """Return the figures of ours and of the plain composition, without and with views of its own."""
    cfg = row_config("opera", row, 0)
    steps: dict[str, OurStep | PlainStep] = {name: PlainStep(cfg, count, d) for name, d in PLAIN.items()}
    found = timed(steps | {OURS: OurStep(cfg, count, side, False)}, count)
    of_views = views_rate(cfg, side)
    for name in PLAIN:
        slower = min(of_views, found[name]["images_per_second"])
        found[name + OWN_VIEWS] = {"images_per_second": slower, "views_per_second": of_views}
    return found


def timed_compiled(row: str, count: int, side: int) -> dict[str, dict]:
    """Return the figures of ours with compiled encoders, and the seconds of its first step."""
    step = OurStep(row_config("opera", row, 0), count, side, True)
    begin = time.perf_counter()
    step()
    synchronise(torch.device(DEVICE))
    seconds = time.perf_counter() - begin
    found = timed({COMPILED: step}, count)
    found[COMPILED]["first_step_seconds"] = seconds
    return found


def bars(steps: dict[str, dict[str, dict]]) -> list[dict]:
    """Return for every network how many times each plain form the faster of ours is, beside what was wanted."""
    rows = []
    for network, forms in steps.items():
        rates = {name: one["images_per_second"] for name, one in forms.items()}
        best = max(rates[name] for name in (OURS, COMPILED) if name in rates)
        for name in (name for name in rates if name.startswith("plain")):
            ratio = best / rates[name]
            rows.append(
                {"bar": f"{network}: times {name}", "wanted": BAR, "found": ratio, "holds": ratio >= BAR}
            )
    return rows


def show(found: dict, path: Path) -> None:
    """Print the checks that are red, the figures and the bars."""
    console, checks = Console(), found["checks"]
    red = [one for one in checks if not one["green"]]
    console.print(f"{len(checks) - len(red)} of {len(checks)} checks hold; all figures: {path}", markup=False)
    for one in red:
        console.print(f"red: {one}", markup=False)
    table = Table("network", "form", "images/s", "ms, median", "extra memory, GB")
    for network, forms in found.get("steps", {}).items():
        for name, one in forms.items():
            milliseconds = f"{one['milliseconds']['median']:.1f}" if "milliseconds" in one else "–"
            memory = f"{one['extra_bytes'] / 1e9:.2f}" if one.get("extra_bytes") is not None else "–"
            table.add_row(network, name, f"{one['images_per_second']:.0f}", milliseconds, memory)
    if table.rows:
        console.print(table)
    for row in found.get("bars", []):
        verdict = "holds" if row["holds"] else "missed"
        console.print(f"{row['bar']}: {row['found']:.2f}, wanted {row['wanted']}: {verdict}", markup=False)
    for network in found.get("not_compiled", []):
        console.print(f"{network}: not compiled, the time for it was over", markup=False)


def measure(out: Path) -> int:
    """Check, then time, writing the JSON as it goes; return the exit code."""
    require_gpu()
    out.mkdir(parents=True, exist_ok=True)
    path, (commit, dirty) = out / "opera.json", git_state(repository_root())
    checks = check_views() + [check_objective(*case) for case in cases()]
    found: dict = {"commit": commit, "dirty": dirty, **environment(), "checks": checks}
    write_figures(found, path)
    green = all(one["green"] for one in checks)
    if green:
        begin = time.perf_counter()
        found |= {"steps": {name: {} for name in NETWORKS}, "not_compiled": []}
        for measured in (timed_forms, timed_compiled):
            for name, network in NETWORKS.items():
                if measured is timed_compiled and time.perf_counter() - begin > COMPILE_UNTIL:
                    found["not_compiled"].append(name)
                    continue
                found["steps"][name] |= measured(*network)
                found["bars"] = bars({name: forms for name, forms in found["steps"].items() if forms})
                found["timing_seconds"] = time.perf_counter() - begin
                write_figures(found, path)
        write_figures(found, path)
    show(found, path)
    return 0 if green else 1


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 where a check is red, 2 after one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m opera.gpu_evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the figures")
    parser.add_argument("--mamba-ssm-source", type=Path, help="has no use here; the other papers' peer")
    parser.add_argument("--data-root", type=Path, help="train the lite rows meant for a GPU too, from here")
    parser.add_argument("--workers", type=int, default=16, help="processes that train side by side")
    options = parser.parse_args(arguments)
    try:
        code = measure(options.out)
        if options.data_root is not None:
            code = max(code, train_rows("opera", GPU_ROWS, options.data_root, options.workers))
        return code
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
