"""From a configuration to a network, and how its parameters and FLOPs are counted.

Counting rule (the same for a row and its baseline): one multiply-add of a linear map or a convolution is 1, a scan is
9 B L D N for each of its directions. Beside it: without the scan, and with every call of the scan counted for one of
its directions: once a layer for Vim, twice for V2M (rows, columns) and VMamba, once for each path of LocalVim.
Copies of the tokens that lie in the batch (the release's, the corners of the general recurrence) count each.
"""

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.errors import UserError
from v2m.kernels.roesser import op as roesser
from v2m.kernels.scan2d.op import FLOPS_PER_STATE

CHANNELS = 3  # images are RGB, grey ones repeated


def build_network(
    model: DictConfig, *, image_size: int, channels: int, classes: int, backend: str, **changes
):
    """Build ``model`` (the config group) for images (B, channels, image_size, image_size), untrained.

    ``changes`` go to the network's constructor. Raises UserError for arguments that do not fit each other.
    """
    if "image_size" in model.network:  # a plain network has positions; a pyramid has none
        changes.setdefault("image_size", image_size)
    try:
        return instantiate(
            model.network, in_channels=channels, num_classes=classes, backend=backend, **changes
        )
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"model {model.name} is configured wrongly ({reason}): fix the key in v2m/configs"
        ) from error


def require_task(cfg: DictConfig) -> None:
    """Raise UserError for a row whose task is not implemented yet."""
    if cfg.data.task != "classification":
        raise UserError(
            f"row {cfg.row} is blocked: detection and segmentation are not implemented yet; "
            "choose a row of classification"
        )


def build_model(cfg: DictConfig) -> nn.Module:
    """Build the network of a run, untrained: images (B, channels, size, size) float -> logits (B, classes)."""
    require_task(cfg)
    return build_network(
        cfg.model,
        image_size=cfg.data.image_size,
        channels=CHANNELS,
        classes=cfg.data.classes,
        backend=cfg.trainer.backend,
    )


def parameters_of(network: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def count_network(network: nn.Module, image_size: int, channels: int) -> dict[str, int]:
    """Return parameters and FLOPs of one image, by the counting rule above; nothing is computed.

    Keys: parameters, flops, flops_without_scan, flops_scan_once.
    """
    scans = {"all": 0, "once": 0}

    def scan(u_shape, delta_shape, A_shape, *arguments, **options) -> int:
        batch, groups, width, height, columns = u_shape
        flops = FLOPS_PER_STATE * batch * width * height * columns * A_shape[2]
        scans["all"] += groups * flops
        scans["once"] += flops
        return groups * flops

    def general(x_shape, delta1_shape, delta2_shape, A1_shape, *arguments, **options) -> int:
        batch, width, height, columns = x_shape
        flops = roesser.FLOPS_PER_STATE * batch * width * height * columns * A1_shape[1]
        scans["all"] += flops
        scans["once"] += flops
        return flops

    network = network.to("meta").eval()
    mapping = {torch.ops.v2m.scan2d: scan, torch.ops.v2m.roesser: general}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, torch.no_grad():
        network(torch.empty(1, channels, image_size, image_size, device="meta"))
    # The counter gives 2 for a multiply-add.
    without = (counter.get_total_flops() - scans["all"]) // 2
    return {
        "parameters": parameters_of(network),
        "flops": without + scans["all"],
        "flops_without_scan": without,
        "flops_scan_once": without + scans["once"],
    }


def count(cfg: DictConfig) -> dict[str, int]:
    """Return parameters and FLOPs of a row's network; keys as ``count_network``."""
    with torch.device("meta"):  # nothing is drawn, nothing takes memory
        network = build_model(cfg)
    return count_network(network, cfg.data.image_size, CHANNELS)
