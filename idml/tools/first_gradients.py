"""How large a fresh network's first gradient is, for every loss with its own metric and with the introspective one.

    python -m idml.tools.first_gradients --network resnet50 --data-root FOLDER [--seed 0]
    python -m idml.tools.first_gradients --network convnet-tiny

Prints a table in Markdown: L2 norms of the gradient of a row's first step to the backbone and to the head of the
uncertainty, and for how many images the step makes the uncertainty longer; images and their mixtures as the rows train,
on the birds (CUB, first 50 classes), or on the digits for convnet-tiny. A metric whose exponential is 0 for every pair
of a fresh network gives neither: nothing would train.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

from idml.losses import BUILDERS
from idml.train import prepare
from shared.claims.compose import quoted, row_config
from shared.command_line import silence_library_logs

ABBREVIATIONS = {
    "triplet": "tsh", "proxynca": "pn", "fastap": "fap", "contrastive": "con", "margin": "mdw",
    "multi-similarity": "ms", "proxy-anchor": "pa",
}  # fmt: skip
NETWORKS = {
    "convnet-tiny": ["model=convnet-tiny", "data=digits", "augment=digits"],
    "resnet-small": [],
    # With random weights, so that its batch norms have to run; weights of ImageNet would give other features.
    "resnet50": ["model=resnet50", "model.pretrained=false", "model.weights_sha256=null", "optim.batch_size=24",
                 "model.freeze_batchnorm=false", "augment.image_size=224", "data.image_size=224"],
}  # fmt: skip
COLUMNS = (
    "loss", "plain: backbone", "introspective: backbone", "its uncertainty head", "uncertainty grows: clean",
    "mixed",
)  # fmt: skip


@dataclass
class FirstStep:
    """L2 norms of a first gradient to the backbone and to the head of the uncertainty, 0 where none comes.

    ``lengthened``: the part of the images whose uncertainty a step against the gradient would make longer, of the
    clean ones and, where the row mixes, of the mixed ones; empty without an uncertainty.
    """

    backbone: float
    head: float
    lengthened: list[float]


def norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the L2 norm of the gradients of some parameters, 0 where none has one."""
    gradients = [parameter.grad.double().norm() for parameter in parameters if parameter.grad is not None]
    return float(torch.stack(gradients).norm()) if gradients else 0.0


def first_step(row: str, seed: int, overrides: list[str]) -> FirstStep:
    """Return what the first batch of a row gives a fresh network."""
    module, data, _ = prepare(row_config("idml", row, seed, overrides))
    network, outputs = module.model, []

    def keep(_network, _images, rows: Tensor) -> None:
        rows.retain_grad()
        outputs.append(rows)

    network.register_forward_hook(keep)
    module.train()
    module.on_train_batch_start(None, 0)
    module.loss(next(iter(data.train_dataloader())), 0).backward()
    if network.uncertainty is None:
        return FirstStep(norm(network.backbone_parameters()), 0.0, [])
    along = [(rows.grad * rows)[:, network.semantic_dim :].sum(1) for rows in outputs]
    lengthened = [float((slope < 0).double().mean()) for slope in along]
    return FirstStep(norm(network.backbone_parameters()), norm(network.uncertainty.parameters()), lengthened)


def gradient_table(data_root: str | None, network: str, seed: int) -> list[str]:
    """Return the lines of the table; rows with mixtures, the one metric beside the other."""
    overrides = [*NETWORKS[network], *([f"paths.data_root={quoted(data_root)}"] if data_root else [])]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for loss in BUILDERS:
        plain = first_step(f"cub50-{ABBREVIATIONS[loss]}-mixup", seed, overrides)
        ours = first_step(f"cub50-idml-{ABBREVIATIONS[loss]}", seed, overrides)
        longer = " | ".join(f"{100 * part:.0f} %" for part in ours.lengthened)
        lines.append(f"| {loss} | {plain.backbone:.2g} | {ours.backbone:.2g} | {ours.head:.2g} | {longer} |")
    return lines


def main() -> None:
    silence_library_logs()
    program = "python -m idml.tools.first_gradients"
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="where cub50 is (DATA_ROOT)")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    Console(soft_wrap=True).print("\n".join(gradient_table(args.data_root, args.network, args.seed)))


if __name__ == "__main__":
    main()
