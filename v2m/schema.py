"""Types of the configuration of a run, types only: values stand in ``configs/*.yaml``; an unknown key is an error."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from shared.data.augment import AugmentationConfig
from shared.dense.config import DenseConfig
from shared.training.config import LauncherConfig, Loggers, PathsConfig, TrainerConfig


@dataclass
class DataConfig:
    name: str = MISSING
    manifest: str | None = MISSING
    task: str = MISSING
    image_size: int = MISSING
    classes: int = MISSING
    train_images: int | None = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    network: dict[str, Any] = MISSING


@dataclass
class AugmentConfig(AugmentationConfig):
    repeats: int = MISSING
    mixup_alpha: float = MISSING
    cutmix_alpha: float = MISSING
    switch_probability: float = MISSING
    smoothing: float = MISSING


@dataclass
class OptimConfig:
    lr: float = MISSING
    min_lr: float = MISSING
    warmup_lr: float = MISSING
    warmup_epochs: float = MISSING
    weight_decay: float = MISSING
    batch_size: int = MISSING
    clip_norm: float | None = MISSING
    ema_decay: float | None = MISSING
    decay_a_log: bool = MISSING
    schedule: str = MISSING
    precision: str = MISSING


@dataclass
class ScaleConfig:
    name: str = MISSING
    epochs: float = MISSING


@dataclass
class ScanTrainerConfig(TrainerConfig):
    backend: str = MISSING


@dataclass
class OutputConfig:
    pictures: bool = MISSING
    batch_size: int = MISSING
    checkpoint_every: int = MISSING
    validate_every: int | None = MISSING


@dataclass
class ClassificationConfig:
    paper: str = MISSING
    row: str = MISSING
    seed: int = MISSING
    variant: str = MISSING
    selection: str = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    augment: AugmentConfig = MISSING
    optim: OptimConfig = MISSING
    scale: ScaleConfig = MISSING
    dense: DenseConfig | None = MISSING
    paths: PathsConfig = MISSING
    trainer: ScanTrainerConfig = MISSING
    logger: Loggers = MISSING
    output: OutputConfig = MISSING
    launcher: LauncherConfig = MISSING
