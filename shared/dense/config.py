"""Types of ``dense``, the part of a configuration that turns a backbone into a detector or a segmenter.

Types only: values stand in ``shared/dense/configs/dense``, a group that every paper with such rows has. A network, its
transforms and its losses are those of a config file of mmdet or mmseg, named by ``base``; ``changes`` say, by dotted
keys, where a row differs from it. Nothing here imports these libraries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf

from shared.data.manifest import load_manifest, manifest_sha256
from shared.errors import UserError

KINDS = ("detection", "segmentation")
# By the source of the images, the manifest of what the data root must hold; drawn images have none.
MANIFESTS = {"coco": "coco2017", "coco256": "coco256", "ade20k": "ade20k", "camvid": "camvid"}
GROUP = Path(__file__).parent / "configs" / "dense"
PRECISIONS = {"detection": ("32-true",), "segmentation": ("32-true", "64-true", "bf16-mixed")}


@dataclass
class DenseDataConfig:
    name: str = MISSING
    source: str = MISSING
    manifest_sha256: str | None = MISSING


@dataclass
class DenseOptimConfig:
    name: str = MISSING
    lr: float = MISSING
    momentum: float = MISSING
    weight_decay: float = MISSING
    no_decay: list[str] = MISSING
    layer_decay: float = MISSING
    clip_norm: float | None = MISSING
    batch_size: int = MISSING
    group: int | None = MISSING
    precision: str = MISSING


@dataclass
class ScheduleConfig:
    warmup_steps: int = MISSING
    warmup_start: float = MISSING
    milestones: list[float] = MISSING
    power: float = MISSING
    end: float = MISSING


@dataclass
class DenseConfig:
    kind: str = MISSING
    base: str = MISSING
    changes: dict[str, Any] = MISSING
    data: DenseDataConfig = MISSING
    optim: DenseOptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    epochs: float | None = MISSING
    steps: int | None = MISSING
    drop_path: float = MISSING
    frozen_stages: int = MISSING
    blocks: list[int] = MISSING
    resize: bool = MISSING
    dilated: bool = MISSING
    ratios: list[float] = MISSING
    weights: str | None = MISSING
    pretraining: str | None = MISSING


class DenseConfigs(SearchPathPlugin):
    """Puts the group ``dense`` on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="dense", path="pkg://shared.dense.configs")


def check_dense(dense: DenseConfig) -> None:
    """Raise UserError for a kind, a length or a precision that cannot be used."""
    precision = dense.optim.precision
    if dense.kind not in KINDS:
        raise UserError(f"dense.kind={dense.kind} is unknown: choose one of {', '.join(KINDS)}")
    length = dense.steps if dense.epochs is None else dense.epochs
    if (dense.epochs is None) == (dense.steps is None) or length <= 0:
        raise UserError(
            f"dense.epochs={dense.epochs} and dense.steps={dense.steps}: set one of them to a positive number, and the "
            "other to null"
        )
    if dense.epochs is None and dense.schedule.milestones:
        raise UserError(
            f"dense.schedule.milestones={list(dense.schedule.milestones)} are epochs, but dense.epochs is null: set "
            "dense.schedule.milestones=[], or dense.epochs"
        )
    if precision not in PRECISIONS[dense.kind]:
        choices = ", ".join(PRECISIONS[dense.kind])
        raise UserError(
            f"dense.optim.precision={precision} is not supported for {dense.kind}: mmdet pastes masks in single "
            f"precision, and bfloat16 loses pixels of boxes; choose one of {choices}"
        )


def _manifest_sha256(source: str) -> str | None:
    name = MANIFESTS.get(source)
    return manifest_sha256(load_manifest(name)) if name else None


Plugins.instance().register(DenseConfigs)
OmegaConf.register_new_resolver("manifest_sha256", _manifest_sha256, replace=True)
