"""How large a fresh network's first gradient is, for every loss with its own metric and with the introspective one.

    python -m idml.tools.first_gradients --network resnet50 --data-root FOLDER [--seed 0]
    python -m idml.tools.first_gradients --network convnet-tiny

Prints a table in Markdown: L2 norms of the gradient of a row's first step to the backbone and to the head of the
uncertainty, images and their mixtures as the rows train; on the birds (CUB, first 50 classes), or on the digits for
convnet-tiny. A metric whose exponential is 0 for every pair of a fresh network gives neither: nothing would train.
"""

import argparse
import logging

import torch
from rich.console import Console

from idml.losses import BUILDERS
from idml.train import prepare
from shared.claims.compose import quoted, row_config

ABBREVIATIONS = {
    "triplet": "tsh", "proxynca": "pn", "fastap": "fap", "contrastive": "con", "margin": "mdw",
    "multi-similarity": "ms", "proxy-anchor": "pa",
}  # fmt: skip
NETWORKS = {
    "convnet-tiny": ["model=convnet-tiny", "data=digits", "augment=digits"],
    "resnet-small": [],
    # Weights of ImageNet are not needed: the heads are fresh either way. Its batch norms then have to run.
    "resnet50": ["model=resnet50", "model.pretrained=false", "model.weights_sha256=null", "optim.batch_size=24",
                 "model.freeze_batchnorm=false", "augment.image_size=224", "data.image_size=224"],
}  # fmt: skip
COLUMNS = ("loss", "plain: backbone", "introspective: backbone", "introspective: uncertainty head")


def norm(parameters) -> float:
    """Return the L2 norm of the gradients of some parameters, 0 where none has one."""
    gradients = [parameter.grad.double().norm() for parameter in parameters if parameter.grad is not None]
    return float(torch.stack(gradients).norm()) if gradients else 0.0


def first_gradients(row: str, seed: int, overrides: list[str]) -> tuple[float, float]:
    """Return the norms of the first step's gradient to the backbone and to the head of the uncertainty."""
    module, data, _ = prepare(row_config("idml", row, seed, overrides))
    module.train()
    torch.manual_seed(seed)
    module.on_train_batch_start(None, 0)
    module.loss(next(iter(data.train_dataloader())), 0).backward()
    network = module.model
    head = network.uncertainty.parameters() if network.uncertainty is not None else ()
    return norm(network.backbone_parameters()), norm(head)


def gradient_table(data_root: str | None, network: str, seed: int) -> list[str]:
    """Return the lines of the table; rows with mixtures, the one metric beside the other."""
    overrides = [*NETWORKS[network], *([f"paths.data_root={quoted(data_root)}"] if data_root else [])]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for loss in BUILDERS:
        short = ABBREVIATIONS[loss]
        plain, _ = first_gradients(f"cub50-{short}-mixup", seed, overrides)
        ours, head = first_gradients(f"cub50-idml-{short}", seed, overrides)
        lines.append(f"| {loss} | {plain:.2g} | {ours:.2g} | {head:.2g} |")
    return lines


def main() -> None:
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="where cub50 is (DATA_ROOT)")
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    Console(soft_wrap=True).print("\n".join(gradient_table(args.data_root, args.network, args.seed)))


if __name__ == "__main__":
    main()
