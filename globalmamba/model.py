"""From a configuration to a network, and how its parameters and FLOPs are counted.

A network is ``cfg.model.network`` with, for the plain (Vim-like) ones, the tokens of ``cfg.model.tokens`` in front:
patches of the image for a baseline, the frequency serialization for GlobalMamba (serialization.py).

Counting rule (the same for a row and its baseline): one multiply-add of a linear map or a convolution is 1, a scan
is 9 B L D N for each of its directions. Beside it: without the scan, and with the scan counted once a layer.
"""

import torch
from hydra.utils import instantiate
from torch import nn

from globalmamba.config import GlobalMambaConfig, TokensAndNetworkConfig
from globalmamba.kernels.selective_scan.op import FLOPS_PER_STATE
from globalmamba.maps import meta_backbone
from globalmamba.model_base import CHANNELS, ScanFlops, count_call, count_with, explained, require_task
from shared.dense import count as dense


def build_network(
    model: TokensAndNetworkConfig, *, image_size: int, channels: int, classes: int, backend: str, **changes
):
    """Build ``model`` (the config group) for images (B, channels, image_size, image_size), untrained.

    ``changes`` go to the network's constructor. Raises UserError for arguments that do not fit each other.
    """
    with explained(model.name):
        if model.tokens is None:
            changes["in_channels"] = channels
        else:
            changes["tokens"] = instantiate(
                model.tokens,
                image_size=image_size,
                in_channels=channels,
                embed_dim=changes.get("embed_dim", model.network.embed_dim),
            )
        return instantiate(model.network, num_classes=classes, backend=backend, **changes)


def build_model(cfg: GlobalMambaConfig) -> nn.Module:
    """Build the network of a run, untrained: images (B, channels, size, size) float -> logits (B, classes)."""
    require_task(cfg)
    size = cfg.data.image_size
    network = build_network(
        cfg.model, image_size=size, channels=CHANNELS, classes=cfg.data.classes, backend=cfg.trainer.backend
    )
    if cfg.model.tokens is None:
        # A pyramid takes images of any size that its levels divide, and looks when it sees one: better now.
        with torch.no_grad():
            network.embed(torch.zeros(1, CHANNELS, size, size))
    return network


def scan_formulas(scans: ScanFlops) -> dict:
    """Return what the scans' operators count, which they add to ``scans``."""

    def scan(u_shape, delta_shape, A_shape, B_shape, *arguments, **options) -> int:
        # Each direction brings a group of B and C of its own.
        directions = B_shape[1] if len(B_shape) == 4 else 1
        flops = FLOPS_PER_STATE * u_shape[0] * u_shape[1] * u_shape[2] * A_shape[1]
        return scans.add(flops // directions, directions)

    return {torch.ops.globalmamba.selective_scan: scan}


def count_network(network: nn.Module, image_size: int, channels: int) -> dict[str, int]:
    """Return parameters and FLOPs of one image, by the counting rule above; nothing is computed.

    Keys: parameters, flops, flops_without_scan, flops_scan_once.
    """
    return count_with(network, image_size, channels, scan_formulas)


def count(cfg: GlobalMambaConfig) -> dict[str, int]:
    """Return parameters and FLOPs of a row's network, with ``dense`` of all its detector or segmenter.

    Keys as ``count_network``; with ``dense``, the image has the size of the published counts (shared/dense/count.py).
    """
    if cfg.dense is not None:
        parameters, call = dense.counted_call(cfg.dense, meta_backbone(cfg, build_network))
        return {"parameters": parameters} | count_call(call, scan_formulas)
    with torch.device("meta"):  # nothing is drawn, nothing takes memory
        network = build_model(cfg)
    return count_network(network, cfg.data.image_size, CHANNELS)


def memory_of(cfg: GlobalMambaConfig) -> dict[str, int]:
    """Return what a device holds while a row with ``dense`` is trained (shared/dense/count.py)."""
    return dense.memory_of(cfg, meta_backbone(cfg, build_network))
