"""From a configuration to a network, and how its parameters and FLOPs are counted.

Counting rule (the same for a row and its baseline): one multiply-add of a linear map or a convolution is 1, a scan is
9 B L D N for each of its directions. Beside it: without the scan, and with every call of the scan counted for one of
its directions: once a layer for Vim, twice for V2M (rows, columns) and VMamba, once for each path of LocalVim.
Copies of the tokens that lie in the batch (the release's, the corners of the general recurrence) count each.
"""

import torch
from hydra.utils import instantiate
from torch import nn

from shared.dense import count as dense
from v2m.kernels.roesser import op as roesser
from v2m.kernels.scan2d.op import FLOPS_PER_STATE
from v2m.maps import meta_backbone
from v2m.model_base import CHANNELS, ScanFlops, count_call, count_with, explained, require_task
from v2m.schema import ClassificationConfig, ModelConfig


def build_network(model: ModelConfig, *, image_size: int, channels: int, classes: int, backend: str, **changes):
    """Build ``model`` (the config group) for images (B, channels, image_size, image_size), untrained.

    ``changes`` go to the network's constructor. Raises UserError for arguments that do not fit each other.
    """
    if "image_size" in model.network:  # a plain network has positions; a pyramid has none
        changes.setdefault("image_size", image_size)
    with explained(model.name):
        return instantiate(model.network, in_channels=channels, num_classes=classes, backend=backend, **changes)


def build_model(cfg: ClassificationConfig) -> nn.Module:
    """Build the network of a run, untrained: images (B, channels, size, size) float -> logits (B, classes)."""
    require_task(cfg)
    return build_network(
        cfg.model,
        image_size=cfg.data.image_size,
        channels=CHANNELS,
        classes=cfg.data.classes,
        backend=cfg.trainer.backend,
    )


def scan_formulas(scans: ScanFlops) -> dict:
    """Return what the scans' operators count, which they add to ``scans``."""

    def scan(u_shape, delta_shape, A_shape, *arguments, **options) -> int:
        batch, groups, width, height, columns = u_shape
        return scans.add(FLOPS_PER_STATE * batch * width * height * columns * A_shape[2], groups)

    def general(x_shape, delta1_shape, delta2_shape, A1_shape, *arguments, **options) -> int:
        batch, width, height, columns = x_shape
        return scans.add(roesser.FLOPS_PER_STATE * batch * width * height * columns * A1_shape[1])

    return {torch.ops.v2m.scan2d: scan, torch.ops.v2m.roesser: general}


def count_network(network: nn.Module, image_size: int, channels: int) -> dict[str, int]:
    """Return parameters and FLOPs of one image, by the counting rule above; nothing is computed.

    Keys: parameters, flops, flops_without_scan, flops_scan_once.
    """
    return count_with(network, image_size, channels, scan_formulas)


def count(cfg: ClassificationConfig) -> dict[str, int]:
    """Return parameters and FLOPs of a row's network, with ``dense`` of all its detector or segmenter.

    Keys as ``count_network``; with ``dense``, the image has the size of the published counts (shared/dense/count.py).
    """
    if cfg.dense is not None:
        parameters, call = dense.counted_call(cfg.dense, meta_backbone(cfg, build_network))
        return {"parameters": parameters} | count_call(call, scan_formulas)
    with torch.device("meta"):  # nothing is drawn, nothing takes memory
        network = build_model(cfg)
    return count_network(network, cfg.data.image_size, CHANNELS)


def memory_of(cfg: ClassificationConfig) -> dict[str, int]:
    """Return what a device holds while a row with ``dense`` is trained (shared/dense/count.py)."""
    return dense.memory_of(cfg, meta_backbone(cfg, build_network))
