"""What the detector or segmenter of a row counts, and what a device holds while it is trained; nothing is computed.

One multiply-add of a linear map or a convolution is 1, and so is one of the attention's two products.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from opera.backbones import build_backbone
from opera.config import OPERAConfig
from opera.dense import backbone_of
from shared.dense import count as dense
from shared.dense.model import Padded


def _meta_backbone(cfg: OPERAConfig) -> Padded:
    with torch.device("meta"):
        return backbone_of(cfg, build_backbone(cfg.model.backbone, cfg.data.image_size))


def count(cfg: OPERAConfig) -> dict[str, int]:
    """Return parameters and FLOPs of a row's detector or segmenter, of one image (shared/dense/count.py)."""
    parameters, call = dense.counted_call(cfg.dense, _meta_backbone(cfg))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return {"parameters": parameters, "flops": counter.get_total_flops() // 2}  # it gives 2 for a multiply-add


def memory_of(cfg: OPERAConfig) -> dict[str, int]:
    """Return what a device holds while the row's detector or segmenter is trained (shared/dense/count.py)."""
    return dense.memory_of(cfg, _meta_backbone(cfg))
