"""What only a GPU can show of IDML: whether losses and neighbours are right, what a step costs, and the lite rows.

    make gpu-evidence OUT=FOLDER [DATA_ROOT=FOLDER]
    python -m idml.tools.gpu_evidence --out FOLDER [--data-root FOLDER] [--workers 16]

First every loss with every metric that it takes is compared with float64 on the CPU, value and gradients, and the
neighbours of all samples with those that the CPU finds. Only if all of that holds is anything timed: the search at the
size of SOP's test set, and a training step of the paper's network at its batch, with and without the metric. It goes
into ``FOLDER/idml.json``, which is written anew after every part. With a data root the lite rows are trained
afterwards, by several processes that share them. Exit code 1 where a check is red or a training failed, 2 without
a GPU.
"""

import argparse
import sys

import torch
from rich.table import Table
from torch import Tensor

from idml.backbones import build_backbone
from idml.embedding import EmbeddingNetwork
from idml.losses import BUILDERS, MetricLoss, build_loss
from idml.neighbours import nearest_neighbours
from idml.objective import objective
from idml.tools.bench import SAMPLES, synthetic
from shared.bench.gpu import Figures, milliseconds, require_gpu, run_script, worst_of
from shared.claims.compose import compose

DEVICE = "cuda"
GPU_ROWS = ("cub50", "cars196t", "cifar10")
CHECKED_SAMPLES, K = 5000, 10  # of the neighbours
BATCH, SIDE, CLASSES = 120, 224, 100  # of the paper's retrieval on CUB
# Relative L2 error of float32: losses add exponentials of 32 times a similarity, the gradients have few digits less.
BOUND = 1e-4
METRICS = {"plain": [], "introspective": ["metric=introspective"], "released": ["metric=released"]}


def cases() -> list[tuple[str, str]]:
    """Return (loss, metric) of all that are defined."""
    return [(loss, m) for loss in BUILDERS for m in METRICS if m != "released" or loss == "proxy-anchor"]


def loss_of(name: str, metric: str, classes: int) -> tuple[MetricLoss, int, int]:
    """Return a loss with its constants of the configs, and the widths of both halves of an embedding."""
    cfg = compose("idml", [f"loss={name}", *METRICS[metric]])
    torch.manual_seed(0)
    loss = build_loss(dict(cfg.loss), dict(cfg.metric), classes, cfg.model.semantic_dim)
    return loss, cfg.model.semantic_dim, cfg.model.uncertainty_dim


def outcome(loss: MetricLoss, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the loss and its gradient to embeddings and proxies."""
    embeddings = embeddings.clone().requires_grad_()
    if hasattr(loss.miner, "seed_step"):
        loss.miner.seed_step(1)
    value = loss(embeddings, labels)
    value.backward()
    gradients = [embeddings.grad, *(parameter.grad for parameter in loss.proxies())]
    return {"loss": value.detach()} | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def check_loss(name: str, metric: str) -> dict:
    """Return the case with its largest relative error against float64 on the CPU."""
    loss, semantic, uncertainty = loss_of(name, metric, 5)
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(40, semantic + uncertainty, generator=draw)
    labels = torch.arange(40) % 5
    expected = outcome(loss.double(), embeddings.double(), labels)
    loss.zero_grad()
    actual = outcome(loss.float().to(DEVICE), embeddings.to(DEVICE), labels.to(DEVICE))
    errors = {
        key: float((actual[key].cpu().double() - value).norm() / value.norm().clamp_min(1e-12))
        for key, value in expected.items()
    }
    worst = worst_of(errors)
    case = {"what": f"{name}, {metric}", "worst": worst, "error": errors[worst]}
    return case | {"green": errors[worst] <= BOUND}


def check_neighbours() -> dict:
    """Return whether the GPU finds the CPU's neighbours, every one and in their order."""
    embeddings, _ = synthetic(CHECKED_SAMPLES)
    expected = nearest_neighbours(embeddings, K)
    differing = int((nearest_neighbours(embeddings.to(DEVICE), K).cpu() != expected).sum())
    return {"what": f"{K} neighbours of {CHECKED_SAMPLES}", "error": differing, "green": not differing}


def timed_search() -> dict:
    """Return the times of the search among as many samples as SOP's test set has."""
    embeddings = synthetic(SAMPLES)[0].to(DEVICE)
    return milliseconds({f"{K} neighbours of {SAMPLES}": lambda: nearest_neighbours(embeddings, K)}, 5, 1)


def timed_steps() -> dict:
    """Return the times, forward and backward in bfloat16 autocast, of ResNet-50's Proxy-Anchor objectives."""
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE)
    labels = torch.arange(BATCH, device=DEVICE) % CLASSES

    def step_of(metric: str, lam: float | None):
        loss, semantic, uncertainty = loss_of("proxy-anchor", metric, CLASSES)
        network = EmbeddingNetwork(build_backbone("resnet50"), semantic, uncertainty).to(DEVICE)
        loss = loss.to(DEVICE)
        trained = [*network.parameters(), *loss.proxies()]

        def step():
            with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
                value = objective(network, loss, images, labels, lam)
            return torch.autograd.grad(value, trained, allow_unused=True)

        return step

    return milliseconds(
        {
            "ResNet-50, Proxy-Anchor": step_of("plain", None),
            "ResNet-50, Proxy-Anchor + mixup": step_of("plain", 0.5),
            "ResNet-50, IDML-PA": step_of("introspective", 0.5),
        },
        queued=1,
    )


def times_of(figures: dict) -> Table:
    table = Table("what", "ms, median", "least", "largest")
    for name, times in figures.get("milliseconds", {}).items():
        table.add_row(name, *(f"{times[key]:.2f}" for key in ("median", "least", "largest")))
    return table


def measure(options: argparse.Namespace) -> bool:
    """Check, then time, writing the figures as it goes; return whether every check is green."""
    require_gpu()
    figures = Figures(options.out / "idml.json")
    figures.add(checks=[check_loss(*case) for case in cases()] + [check_neighbours()])
    if figures.green:
        times: dict = {}
        for timed in (timed_search, timed_steps):
            times |= timed()
            figures.add(milliseconds=times)
    figures.show(times_of(figures.parts), [])
    return figures.green


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code (``run_script``)."""
    return run_script("idml", __doc__.split("\n")[0], measure, GPU_ROWS, arguments, workers=16)


if __name__ == "__main__":
    sys.exit(main())
