"""Small detectors and segmenters on drawn images for the tests: a configuration, a backbone, the marks of skips."""

import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from shared.dense import libraries
from shared.dense.config import DenseConfig
from shared.training import config

installed = pytest.mark.skipif(
    bool(libraries.missing_modules()), reason="the extra for detection and segmentation is not here: make setup-dense"
)
MASK_RCNN = {
    "dense.changes": {
        "model.neck.out_channels": 16,
        "model.rpn_head.in_channels": 16,
        "model.rpn_head.feat_channels": 16,
        "model.rpn_head.anchor_generator.scales": [4],
        "model.roi_head.bbox_roi_extractor.out_channels": 16,
        "model.roi_head.bbox_head.in_channels": 16,
        "model.roi_head.bbox_head.fc_out_channels": 32,
        "model.roi_head.mask_roi_extractor.out_channels": 16,
        "model.roi_head.mask_head.in_channels": 16,
        "model.roi_head.mask_head.conv_out_channels": 16,
        "model.roi_head.mask_head.num_convs": 1,
        "train_dataloader.dataset.pipeline": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
            {"type": "Resize", "scale": [64, 64], "keep_ratio": True},
            {"type": "RandomFlip", "prob": 0.5},
            {"type": "PackDetInputs"},
        ],
        "test_dataloader.dataset.pipeline": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
            {"type": "Resize", "scale": [64, 64], "keep_ratio": True},
            {"type": "PackDetInputs", "meta_keys": ["img_id", "img_path", "ori_shape", "img_shape", "scale_factor"]},
        ],
    },
    "dense.data.source": "shapes",
    "dense.schedule.warmup_steps": 2,
    "dense.optim.batch_size": 8,
}
UPERNET = {
    "dense.changes": {
        "model.data_preprocessor.size": [64, 64],
        "model.decode_head.channels": 16,
        "model.auxiliary_head.channels": 16,
        "train_dataloader.dataset.pipeline": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations"},
            {"type": "RandomResize", "scale": [64, 64], "ratio_range": [0.75, 1.75], "keep_ratio": True},
            {"type": "RandomCrop", "crop_size": [64, 64], "cat_max_ratio": 0.75},
            {"type": "RandomFlip", "prob": 0.5},
            {"type": "PhotoMetricDistortion"},
            {"type": "PackSegInputs"},
        ],
        "test_dataloader.dataset.pipeline": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations"},
            {"type": "PackSegInputs"},
        ],
    },
    "dense.data.source": "shapes-labels",
    "dense.schedule.warmup_steps": 2,
    "dense.optim.batch_size": 8,
    "dense.ratios": [],
}
SMALL = {"detection": ("mask-rcnn-1x", MASK_RCNN), "segmentation": ("upernet", UPERNET)}
STEPS = {"detection": 3, "segmentation": 4}
config.register_schema(Path(__file__).parent / "small", DenseConfig)


def group(name: str) -> DictConfig:
    """Return a file of the group ``dense``, its defaults resolved."""
    with initialize_config_module("shared.dense.configs", version_base="1.3"):
        return compose(f"dense/{name}").dense


def dense_config(name: str, folder: Path, changes: dict | None = None) -> DictConfig:
    """Return a configuration of a run of ``dense=name`` below ``folder``, with ``changes`` by dotted keys."""
    cfg = OmegaConf.create(
        {
            "paper": "small",
            "row": f"small-{name}",
            "seed": 0,
            "dense": group(name),
            "paths": {"data_root": os.environ.get("DATA_ROOT"), "results": str(folder), "runs": str(folder / "runs")},
            "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "workers": 0},
            "optim": {"precision": "32-true"},
            "output": {"checkpoint_every": 10**6, "validate_every": None},
            "logger": {},
        }
    )
    for key, value in (changes or {}).items():
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def small_config(kind: str, folder: Path, changes: dict | None = None) -> DictConfig:
    """Return a configuration of a small network of a kind on drawn images, for STEPS steps."""
    name, small = SMALL[kind]
    lengths = {"dense.epochs": None, "dense.steps": STEPS[kind], "dense.schedule.milestones": []}
    return dense_config(name, folder, small | lengths | (changes or {}))


class Tiny(nn.Module):
    """Images (B, 3, H, W) -> four maps at 1/4 to 1/32, by one convolution each."""

    def __init__(self, channels: tuple[int, ...] = (8, 8, 16, 16), norm: type[nn.Module] = nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.channels = channels
        widths = zip((3, *channels), channels, (4, 2, 2, 2), strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, out, 2 * stride - 1, stride, stride - 1), norm(out), nn.ReLU())
            for width, out, stride in widths
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = [images / 50]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return tuple(maps[1:])
