"""What this paper promises about speed: a pre-training step beside its reference.

    python -m opera.tools.bench [--threads 2] [--batch 128] [--steps 5]

A step goes from uint8 images in memory to the moved momentum encoder: two views, both encoders, the objective,
backward, the optimiser. Ours is the step that trains (module.py); the reference is that of reference.py, on the same
networks with the same optimiser. They take their steps in turn, medians; the memory is the rise of the resident peak
over a first step in a process of its own (Linux). Below the table: where a step of ours spends its time.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from opera.module import PretrainingModule, build_optimizer
from opera.tools import reference
from opera.train import build_hierarchy
from opera.views import Views
from shared.bench.measure import measured
from shared.claims.compose import compose

NETWORKS = {
    "resnet-small, 32 px": ["model=resnet-small", "heads=small", "optim=small-resnet"],
    "vit-tiny, 32 px": ["model=vit-tiny", "heads=small-vit", "optim=small-vit"],
}
COMMON = ["data=cifar10-jpg", "views=small", "augment=small", "objective=opera", "objective.temperature=0.2"]
MOMENTUM, RATE = 0.99, 1e-3
CLASSES = 10  # of the labels
PARTS = ("views", "encoders and objective", "backward", "optimiser and momentum encoder")


def module_of(overrides: list[str], device: str = "cpu") -> PretrainingModule:
    """Return the module of a pre-training, untrained, on a device."""
    cfg = compose("opera", [*COMMON, *overrides])
    return PretrainingModule(build_hierarchy(cfg), Views(cfg.views), cfg, steps=1000).to(device).train()


def images_of(module: PretrainingModule, batch: int, device: str = "cpu") -> dict[str, Tensor]:
    """Return a batch as a step gets it: noise at the views' size; what names the draws stays on the host."""
    draw, size = torch.Generator().manual_seed(0), module.views.cfg.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), generator=draw, dtype=torch.uint8)
    fields = {"images": images.to(device), "labels": (torch.arange(batch) % CLASSES).to(device)}
    return fields | {"indices": torch.arange(batch), "epoch": torch.tensor(0)}


def optimizer_of(module: PretrainingModule, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe for what trains of a model, at a rate that moves it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return build_optimizer(module.optim.name, trained, RATE, module.optim.weight_decay)


class OurStep:
    """The step that trains, with the guard against what is not finite; ``parts`` keeps the seconds of its parts."""

    def __init__(self, overrides: list[str], batch: int):
        self.module = module_of(overrides)
        self.batch = images_of(self.module, batch)
        self.optimizer = optimizer_of(self.module, self.module.model)
        self.parts: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> None:
        at = [time.perf_counter()]
        self.module.on_train_batch_start(self.batch, 0)
        views = self.module.both_views(self.batch)
        at.append(time.perf_counter())
        total = self.module.model(*views, self.batch["labels"]).total
        at.append(time.perf_counter())
        self.optimizer.zero_grad()
        total.backward()
        at.append(time.perf_counter())
        self.module.last_loss = total.detach()
        self.module.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.module.model.update_momentum(MOMENTUM)
        at.append(time.perf_counter())
        for name, begin, end in zip(PARTS, at[:-1], at[1:], strict=True):
            self.parts[name].append(end - begin)


class ReferenceStep:
    """The reference of the same step."""

    def __init__(self, overrides: list[str], batch: int):
        module = module_of(overrides)
        self.batch, self.views = images_of(module, batch), reference.build_views(module.views.cfg)
        cfg = compose("opera", [*COMMON, *overrides])
        self.model = build_hierarchy(cfg).train()
        self.optimizer = optimizer_of(module, self.model)

    def __call__(self) -> None:
        first, second = reference.view_batch(self.views, self.batch["images"])
        self.optimizer.zero_grad()
        reference.objective(self.model, first, second, self.batch["labels"]).backward()
        self.optimizer.step()
        reference.update_momentum(self.model, MOMENTUM)


FORMS = {"reference": ReferenceStep, "ours": OurStep}


def in_turn(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every call, one of each after the other, a first round left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m opera.tools.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--steps", type=int, default=5, help="of each form")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    title = f"a pre-training step of OPERA, batch {options.batch}, {options.threads} threads"
    columns = ("network", "form", "images/s", "seconds, least to largest", "times the reference", "extra memory, MB")
    table = Table(*columns, title=title)
    shares = Table("network", *PARTS, title="% of a step of ours")
    for name, overrides in NETWORKS.items():
        steps = {form: build(overrides, options.batch) for form, build in FORMS.items()}
        times = in_turn(steps, options.steps)
        medians = {form: statistics.median(seconds) for form, seconds in times.items()}
        for form, seconds in medians.items():
            extra = measured(FORMS[form], overrides, options.batch, threads=options.threads).extra_bytes
            memory = "–" if extra is None else f"{extra / 1e6:.0f}"
            ratio = f"{medians['reference'] / seconds:.2f}"
            spread = f"{min(times[form]):.2f} to {max(times[form]):.2f}"
            table.add_row(name, form, f"{options.batch / seconds:.0f}", spread, ratio, memory)
        parts = [statistics.median(steps["ours"].parts[part][1:]) for part in PARTS]
        shares.add_row(name, *(f"{100 * part / sum(parts):.0f}" for part in parts))
    console = Console(width=None if sys.stdout.isatty() else 140)  # a pipe has no width
    console.print(table)
    console.print(shares)


if __name__ == "__main__":
    main()
