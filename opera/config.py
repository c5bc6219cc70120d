"""Types of OPERA's configuration, types only: values are in ``configs/*.yaml``; an unknown key is an error."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from opera.views import ViewsConfig
from shared.claims import rows
from shared.data.augment import AugmentationConfig
from shared.dense.config import DenseConfig
from shared.training.config import LauncherConfig, Loggers, PathsConfig, TrainerConfig

CONFIGS = str(Path(__file__).parent / "configs")


@dataclass
class DataConfig:
    name: str = MISSING
    manifest: str = MISSING
    image_size: int = MISSING
    classes: int = MISSING
    train_images: int | None = MISSING
    labelled: float = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    backbone: str = MISSING


@dataclass
class HeadsConfig:
    dim: int = MISSING
    hidden: int = MISSING
    projector_layers: int = MISSING
    predictor_layers: int = MISSING
    predictor_norm: bool = MISSING
    class_hidden: int = MISSING
    class_layers: int = MISSING


@dataclass
class MaskConfig:
    ratio: float = MISSING
    width: int = MISSING
    depth: int = MISSING
    heads: int = MISSING
    weight: float = MISSING
    train_patches: bool = MISSING


@dataclass
class ObjectiveConfig:
    arrangement: str = MISSING
    temperature: float = MISSING
    loss_weights: str = MISSING
    denominator: str = MISSING
    momentum: float = MISSING
    mask: MaskConfig | None = None


@dataclass
class OptimConfig:
    name: str = MISSING
    lr: float = MISSING
    weight_decay: float = MISSING
    batch_size: int = MISSING
    warmup_epochs: float = MISSING
    precision: str = MISSING


@dataclass
class TaskConfig:
    kind: str = MISSING
    sets: list[str] = MISSING
    train_images: int | None = MISSING
    epochs: int = MISSING
    lr: float = MISSING
    weight_decay: float = MISSING
    batch_size: int = MISSING
    warmup_epochs: float = MISSING
    drop_path: float = MISSING
    mixup_alpha: float = MISSING
    cutmix_alpha: float = MISSING
    smoothing: float = MISSING
    neighbours: int | None = MISSING
    neighbour_temperature: float = MISSING
    repeats: int = MISSING
    weights: str | None = MISSING


@dataclass
class ScaleConfig:
    name: str = MISSING
    epochs: int = MISSING


@dataclass
class OutputConfig:
    batch_size: int = MISSING
    checkpoint_every: int = MISSING
    validate_every: int | None = MISSING
    compile: bool = MISSING


@dataclass
class OPERAConfig:
    paper: str = MISSING
    row: str = MISSING
    seed: int = MISSING
    variant: str = MISSING
    selection: str = MISSING
    model: ModelConfig = MISSING
    heads: HeadsConfig = MISSING
    objective: ObjectiveConfig = MISSING
    data: DataConfig = MISSING
    views: ViewsConfig = MISSING
    optim: OptimConfig = MISSING
    task: TaskConfig = MISSING
    augment: AugmentationConfig = MISSING
    scale: ScaleConfig = MISSING
    dense: DenseConfig | None = MISSING
    paths: PathsConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: Loggers = MISSING
    output: OutputConfig = MISSING
    launcher: LauncherConfig = MISSING


rows.register(Path(__file__).parent, OPERAConfig)
