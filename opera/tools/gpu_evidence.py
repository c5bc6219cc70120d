"""What only a GPU can show of OPERA: whether views and objectives are right, what a step costs, and the lite rows.

    make gpu-evidence OUT=FOLDER [DATA_ROOT=FOLDER]
    python -m opera.tools.gpu_evidence --out FOLDER [--data-root FOLDER] [--workers 8]

First the views of one batch are compared with those that the CPU makes in float32, and the objective of every
arrangement with float64 on the CPU, value and gradients. Only if all of that holds is a pre-training step timed:
ours (views on the device, one pass of both views where statistics allow it, bfloat16, compiled backbones, the guard
against what is not finite) beside the reference (reference.py; its views on the CPU, timed apart, in float32, in
bfloat16, and in that with compiled backbones, which tells what the compiler alone is worth). It goes into
``FOLDER/opera.json``, which is written anew after every part. With a data root the lite rows are trained afterwards, a
process for each. Exit code 1 where a check is red or a training failed, 2 without a GPU; a bar that is missed is a
result and changes no exit code.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor

from opera.hierarchy import ARRANGEMENTS
from opera.masked import MASKED_ARRANGEMENTS
from opera.module import PretrainingModule
from opera.tools import reference
from opera.tools.bench import MOMENTUM, images_of, optimizer_of
from opera.train import build_hierarchy
from opera.views import Views
from shared.bench.gpu import Figures, milliseconds, require_gpu, run_script, worst_of
from shared.claims.compose import compose

DEVICE = "cuda"
GPU_ROWS = ("cifar10-all", "tiny32", "imagenette")
# Relative L2 error of float32: of views, of losses, of gradients that have passed batch norms.
BOUND = {"view": 1e-4, "loss": 1e-5, "gradient": 1e-3}
CHECKED = 32  # images
IMAGENET = ["data=imagenet1k", "scale.name=full"]
STEPS = {
    "ResNet-50, 224 px": ([*IMAGENET, "model=resnet50", "heads=resnet", "views=resnet", "optim=resnet"], 128),
    "ViT-S, 224 px": ([*IMAGENET, "model=vit-small", "heads=vit", "views=vit", "optim=vit"], 128),
    "resnet-small, 32 px": (
        ["data=cifar10-jpg", "model=resnet-small", "heads=small", "views=small", "optim=small-resnet"],
        1024,
    ),
}
AUGMENT = "augment=probe"
BAR = 1.5  # times the speed of the reference in bfloat16, which gets its views ready made
REPEATS, QUEUED = 5, 4  # steps one after another, as in a training: where launching them is slow, it shows


def module_of(overrides: list[str], device: str) -> PretrainingModule:
    """Return the module of a pre-training, untrained, on a device."""
    cfg = compose("opera", [AUGMENT, *overrides])
    return PretrainingModule(build_hierarchy(cfg), Views(cfg.views), cfg, steps=1000).to(device).train()


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error."""
    expected = expected.double()
    return float((actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-12))


def check_views(name: str) -> dict:
    """Return the largest error of both views on the GPU against those of the CPU, of the recipe of a step."""
    module = module_of(STEPS[name][0], "cpu")
    batch = images_of(module, CHECKED)
    expected = module.both_views(batch)
    actual = module.both_views({key: value.to(DEVICE) for key, value in batch.items()})
    error = max(error_of(view, expected_view) for view, expected_view in zip(actual, expected, strict=True))
    return {"what": f"views of {name}", "error": error, "green": error <= BOUND["view"]}


def outcome(module: PretrainingModule, batch: dict[str, Tensor], views: list[Tensor]) -> dict[str, Tensor]:
    """Return the loss and the gradients of the trained parameters."""
    total = module.model(*views, batch["labels"], module.key(batch)).total
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))
    return {"loss": total.detach()} | gradients


def check_objective(arrangement: str) -> dict:
    """Return the largest errors of an arrangement's loss and gradients against float64 on the CPU."""
    masked = arrangement in MASKED_ARRANGEMENTS
    overrides = ["data=cifar10-jpg", "views=small", "data.image_size=16"]
    if masked:
        overrides += ["objective=opera-mae", "objective.mask.width=32", "objective.mask.depth=1"]
        overrides += ["objective.mask.heads=2", "model=vit-tiny", "heads=small-vit"]
    else:
        overrides += ["model=resnet-small", "heads=small"]
    overrides += [f"objective.arrangement={arrangement}"]
    exact, single = module_of(overrides, "cpu").double(), module_of(overrides, DEVICE)
    batch = images_of(exact, CHECKED)
    views = exact.both_views(batch)
    expected = outcome(exact, batch, views)
    on_device = {key: value.to(DEVICE) for key, value in batch.items()}
    with torch.backends.cudnn.flags(allow_tf32=False):  # ten bits of a convolution are no check
        actual = outcome(single, on_device, [view.to(DEVICE, torch.float32) for view in views])
    size = max(float(value.norm()) for name, value in expected.items() if name != "loss")
    # A gradient that is rounding alone, such as a bias's before a batch norm, is measured by the largest one.
    errors = {
        name: error_of(actual[name], value)
        if name == "loss" or float(value.norm()) > 1e-6 * size
        else float((actual[name].cpu().double() - value).norm()) / size
        for name, value in expected.items()
    }
    green = all(error <= BOUND["loss" if name == "loss" else "gradient"] for name, error in errors.items())
    worst = worst_of(errors)
    return {"what": f"objective, {arrangement}", "worst": worst, "error": errors[worst], "green": green}


def our_step(name: str) -> Callable[[], None]:
    """Return a step of ours from uint8 images on the GPU."""
    overrides, size = STEPS[name]
    module = module_of([*overrides, "output.compile=true"], DEVICE)
    batch = images_of(module, size, DEVICE)
    optimizer = optimizer_of(module, module.model)

    def step() -> None:
        module.on_train_batch_start(batch, 0)
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            total = module.terms(batch).total
        optimizer.zero_grad()
        total.backward()
        module.last_loss = total.detach()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        module.model.update_momentum(MOMENTUM)

    return step


def reference_step(name: str, half: bool, compiled: bool = False) -> Callable[[], None]:
    """Return a step of the reference from views on the GPU, in bfloat16 where ``half``, compiled or not."""
    overrides, size = STEPS[name]
    module = module_of(overrides, DEVICE)
    batch = images_of(module, size, DEVICE)
    first, second = (view.contiguous() for view in module.both_views(batch))
    model = build_hierarchy(compose("opera", [AUGMENT, *overrides])).to(DEVICE).train()
    if compiled:
        model.compile_encoders()
    optimizer = optimizer_of(module, model)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=half):
            total = reference.objective(model, first, second, batch["labels"])
        total.backward()
        optimizer.step()
        reference.update_momentum(model, MOMENTUM)

    return step


def reference_view_seconds(name: str) -> float:
    """Return the seconds in which one core makes the reference's views of a batch, from a part of it."""
    overrides, size = STEPS[name]
    module = module_of(overrides, "cpu")
    images = images_of(module, CHECKED)["images"]
    views, threads = reference.build_views(module.views.cfg), torch.get_num_threads()
    torch.set_num_threads(1)
    reference.view_batch(views, images[:2])
    begin = time.perf_counter()
    reference.view_batch(views, images)
    torch.set_num_threads(threads)
    return (time.perf_counter() - begin) * size / CHECKED


def timed(name: str) -> dict:
    """Return the times of the forms of a step, images a second, peak memory, and the cost of the reference's views."""
    figures: dict = {"views_on_a_core_s": reference_view_seconds(name)}
    forms = {
        "ours": lambda: our_step(name),
        "reference, bfloat16": lambda: reference_step(name, True),
        "reference, bfloat16, compiled": lambda: reference_step(name, True, True),
        "reference, float32": lambda: reference_step(name, False),
    }
    for form, build in forms.items():
        step = build()
        step()  # compiles
        torch.cuda.reset_peak_memory_stats()
        times = milliseconds({form: step}, REPEATS, QUEUED)[form]
        speed = STEPS[name][1] / (times["median"] / 1e3)
        figures[form] = times | {"images_per_second": speed, "peak_bytes": torch.cuda.max_memory_allocated()}
        del step
        torch.cuda.empty_cache()
    ratio = figures["ours"]["images_per_second"] / figures["reference, bfloat16"]["images_per_second"]
    return figures | {"times_reference": ratio, "wanted": BAR, "holds": ratio >= BAR}


def times_of(figures: dict) -> Table:
    table = Table("network", "form", "ms, median", "images/s", "peak, GB")
    for name, forms in figures.get("steps", {}).items():
        for form, times in forms.items():
            if isinstance(times, dict):
                memory = f"{times['peak_bytes'] / 1e9:.2f}"
                table.add_row(name, form, f"{times['median']:.2f}", f"{times['images_per_second']:.0f}", memory)
    return table


def verdicts(figures: dict) -> list[str]:
    return [
        f"{name}: {forms['times_reference']:.2f} times the reference in bfloat16, wanted {BAR}: "
        f"{'holds' if forms['holds'] else 'missed'}; beside it, the reference's views take one core "
        f"{forms['views_on_a_core_s']:.2f} s a batch"
        for name, forms in figures.get("steps", {}).items()
    ]


def measure(options: argparse.Namespace) -> bool:
    """Check, then time, writing the figures as it goes; return whether every check is green."""
    require_gpu()
    figures = Figures(options.out / "opera.json")
    checks = [check_views(name) for name in STEPS]
    checks += [check_objective(arrangement) for arrangement in (*ARRANGEMENTS, *MASKED_ARRANGEMENTS)]
    figures.add(checks=checks)
    if figures.green:
        steps: dict = {}
        for name in STEPS:
            steps[name] = timed(name)
            figures.add(steps=steps)
    figures.show(times_of(figures.parts), verdicts(figures.parts))
    return figures.green


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code (``run_script``)."""
    return run_script("opera", __doc__.split("\n")[0], measure, GPU_ROWS, arguments, workers=8)


if __name__ == "__main__":
    sys.exit(main())
