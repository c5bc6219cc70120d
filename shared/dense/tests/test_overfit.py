"""Small networks learn a few real images by heart: the whole path from files to scores, by the code of a run.

Minutes of one core each. Training images are the test images; nothing is augmented.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from shared.dense import run, sources, yolo
from shared.dense.libraries import detection
from shared.dense.sources import CAMVID, Source
from shared.dense.tests.small import MASK_RCNN, UPERNET, dense_config, installed
from shared.dense.tests.test_sources import real_data
from shared.files import write_text

pytestmark = [installed, pytest.mark.slow, pytest.mark.timeout(1800)]
CROP = (128, 96)  # of 240 x 180 pixels, from the middle: all of them take four times as long


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(8, width)


class Residual(nn.Module):
    """Images (B, 3, H, W) -> four maps at 1, 1/2, 1/4 and 1/8 of the stem's grid, a residual block each.

    ``stem``: kernel, stride and padding of the first convolution.
    """

    def __init__(self, channels: tuple[int, ...], stem: tuple[int, int, int], norm):
        super().__init__()
        torch.manual_seed(0)
        self.channels = channels
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], *stem), norm(channels[0]), nn.ReLU())
        self.blocks = nn.ModuleList(self.block(width, norm) for width in channels)
        steps = zip(channels[:-1], channels[1:], strict=True)
        self.steps = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 2, 2, bias=False), norm(b)) for a, b in steps)

    def block(self, width: int, norm) -> nn.Module:
        first, second = (nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2))
        return nn.Sequential(first, norm(width), nn.ReLU(), second, norm(width))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        grid, maps = self.stem(images), []
        for step, block in zip([nn.Identity(), *self.steps], self.blocks, strict=True):
            grid = step(grid)
            grid = (grid + block(grid)).relu()
            maps.append(grid)
        return tuple(maps)


def large_objects(root: Path, split: str, cache: Path) -> dict:
    """Write the annotations of the first 16 training images of coco256 with one to three large, solid objects.

    Each side of a box is 64 of 320 pixels or more and the object fills three tenths of it: smaller and thinner ones
    take more pixels, and so minutes, than a test has.
    """
    classes = detection().registry.DATASETS.get("CocoDataset").METAINFO["classes"]
    content, things = yolo.annotations(root, "train2017", classes), {}
    for thing in content["annotations"]:
        things.setdefault(thing["image_id"], []).append(thing)
    chosen = [
        image
        for image in content["images"]
        if len(own := things.get(image["id"], [])) in (1, 2, 3)
        and min(min(thing["bbox"][2:]) for thing in own) >= 64
        and min(thing["area"] / (thing["bbox"][2] * thing["bbox"][3]) for thing in own) >= 0.3
    ][:16]
    assert len(chosen) == 16
    content |= {"images": chosen, "annotations": [thing for image in chosen for thing in things[image["id"]]]}
    write_text(cache / "sixteen.json", json.dumps(content))
    images = root / yolo.FOLDER / "images/train2017"
    return {"ann_file": str(cache / "sixteen.json"), "data_prefix": {"img": str(images)}}


def test_mask_rcnn_learns_sixteen_images_of_coco_by_heart(monkeypatch, tmp_path):
    root = real_data(yolo.FOLDER)
    monkeypatch.setitem(sources.SOURCES, "sixteen", Source("detection", "CocoDataset", large_objects))
    monkeypatch.setitem(sources.MANIFESTS, "sixteen", "coco256")
    width, changes = 32, dict(MASK_RCNN["dense.changes"])
    for name in ("neck.out", "rpn_head.in", "rpn_head.feat", "roi_head.bbox_head.in", "roi_head.mask_head.in"):
        changes[f"model.{name}_channels"] = width
    for name in ("bbox", "mask"):
        changes[f"model.roi_head.{name}_roi_extractor.out_channels"] = width
    changes |= {
        "model.rpn_head.anchor_generator.scales": [8],
        "model.roi_head.bbox_head.fc_out_channels": 128,
        "model.roi_head.bbox_head.reg_class_agnostic": True,
        "model.roi_head.mask_head.conv_out_channels": 48,
        "model.roi_head.mask_head.num_convs": 2,
        "model.roi_head.mask_head.class_agnostic": True,
        "model.roi_head.mask_head.loss_mask.loss_weight": 2.0,
        "model.train_cfg.rpn_proposal.max_per_img": 100,
        "model.train_cfg.rcnn.sampler.num": 64,
        "model.train_cfg.rcnn.sampler.pos_fraction": 0.5,
        "model.test_cfg.rpn.max_per_img": 100,
        "model.test_cfg.rpn.nms_pre": 100,
    }
    for split in ("train", "test"):
        key = f"{split}_dataloader.dataset.pipeline"
        steps = [step for step in changes[key] if step["type"] != "RandomFlip"]
        changes[key] = [step | {"scale": [160, 160]} if step["type"] == "Resize" else step for step in steps]
    recipe = {
        "dense.changes": changes,
        "dense.data.source": "sixteen",
        "dense.optim.name": "adamw",
        "dense.optim.lr": 2e-3,
        "dense.optim.weight_decay": 0.0,
        "dense.optim.batch_size": 4,
        "dense.schedule.warmup_steps": 50,
        "dense.schedule.milestones": [],
        "dense.epochs": None,
        "dense.steps": 1200,
        "paths.data_root": str(root),
    }
    cfg = dense_config("mask-rcnn-r50-1x", tmp_path, recipe)
    backbone = Residual((32, 32, 64, 128), (4, 4, 0), group_norm)
    metrics = run.run(cfg, backbone, tmp_path / "row" / "seed0")
    assert metrics["n_test"] == metrics["train_images"] == 16
    assert metrics["ap_box"] > 0.9 and metrics["ap_mask"] > 0.85, metrics


def test_upernet_learns_eight_images_of_camvid_by_heart(monkeypatch, tmp_path):
    root = real_data("camvid_half")
    width, height = CROP
    for folder, ending in (("train", "jpg"), ("trainannot", "png")):
        (tmp_path / folder).mkdir()
        for path in sorted((root / "camvid_half" / folder).glob(f"*.{ending}"))[::45][:8]:
            with Image.open(path) as image:
                left, top = (image.width - width) // 2, (image.height - height) // 2
                image.crop((left, top, left + width, top + height)).save(tmp_path / folder / f"{path.stem}.png")
    prefix = {"img_path": str(tmp_path / "train"), "seg_map_path": str(tmp_path / "trainannot")}
    where = {"img_suffix": ".png", "data_prefix": prefix}
    eight = Source("segmentation", "BaseSegDataset", lambda *_: where, CAMVID, void=11)
    monkeypatch.setitem(sources.SOURCES, "eight", eight)
    steps = [{"type": name} for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
    changes = UPERNET["dense.changes"] | {
        "model.data_preprocessor.size": [height, width],
        "train_dataloader.dataset.pipeline": steps,
        "test_dataloader.dataset.pipeline": steps,
    }
    for head in ("decode", "auxiliary"):
        changes |= {f"model.{head}_head.channels": 32, f"model.{head}_head.dropout_ratio": 0.0}
    recipe = {
        "dense.changes": changes,
        "dense.data.source": "eight",
        "dense.optim.lr": 5e-3,
        "dense.optim.weight_decay": 0.0,
        "dense.optim.batch_size": 8,
        "dense.schedule.warmup_steps": 20,
        "dense.epochs": None,
        "dense.steps": 500,
    }
    backbone = Residual((32, 48, 64, 64), (5, 2, 2), nn.BatchNorm2d)
    metrics = run.run(dense_config("camvid", tmp_path, recipe), backbone, tmp_path / "row" / "seed0")
    assert metrics["n_test"] == metrics["train_images"] == 8
    assert metrics["miou"] > 0.95, metrics
