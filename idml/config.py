"""Types of IDML's configuration, types only: values are in ``configs/*.yaml``; an unknown key is an error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from shared.claims import rows
from shared.data.augment import AugmentationConfig
from shared.training.config import LauncherConfig, Loggers, PathsConfig, TrainerConfig

CONFIGS = str(Path(__file__).parent / "configs")


@dataclass
class DataConfig:
    name: str = MISSING
    manifest: str = MISSING
    task: str = MISSING  # retrieval | classification
    image_size: int = MISSING
    classes: int = MISSING
    train_images: int | None = MISSING
    held_out: float = MISSING
    per_class: int | None = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    backbone: str = MISSING
    pretrained: bool = MISSING
    weights_sha256: str | None = MISSING
    freeze_batchnorm: bool = MISSING
    semantic_dim: int | None = MISSING
    uncertainty_dim: int = MISSING
    pooling: str = MISSING
    uncertainty_init: str = MISSING


@dataclass
class ObjectiveConfig:
    mixup_alpha: float | None = MISSING
    cutmix_alpha: float | None = MISSING
    mixed_batches: float = MISSING


@dataclass
class OptimConfig:
    optimizer: str = MISSING
    lr: float = MISSING
    proxy_lr_factor: float = MISSING
    proxy_weight_decay: float | None = MISSING
    momentum: float = MISSING
    weight_decay: float = MISSING
    batch_size: int = MISSING
    clip_value: float | None = MISSING
    clip_norm: float | None = MISSING
    warmup_epochs: int = MISSING
    milestones: list[int] = MISSING
    gamma: float = MISSING
    precision: str = MISSING


@dataclass
class ScaleConfig:
    name: str = MISSING
    epochs: int = MISSING


@dataclass
class WeightsPathsConfig(PathsConfig):
    weights: str | None = MISSING


@dataclass
class EvaluationConfig:
    recall_at: list[int] = MISSING
    kmeans: str = MISSING
    kmeans_seeds: int = MISSING


@dataclass
class OutputConfig:
    pictures: bool = MISSING
    batch_size: int = MISSING
    checkpoint_every: int = MISSING
    validate_every: int | None = MISSING


@dataclass
class IDMLConfig:
    paper: str = MISSING
    row: str = MISSING
    seed: int = MISSING
    variant: str = MISSING
    selection: str = MISSING
    loss: dict[str, Any] = MISSING
    metric: dict[str, Any] = MISSING
    objective: ObjectiveConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    augment: AugmentationConfig = MISSING
    optim: OptimConfig = MISSING
    scale: ScaleConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    paths: WeightsPathsConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: Loggers = MISSING
    output: OutputConfig = MISSING
    launcher: LauncherConfig = MISSING


rows.register(Path(__file__).parent, IDMLConfig)
