"""Types of PDML's configuration. Types only: every value is in ``configs/*.yaml``; an unknown key is an error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from shared.claims import rows
from shared.training.config import LauncherConfig, Loggers, PathsConfig, TrainerConfig

CONFIGS = str(Path(__file__).parent / "configs")


@dataclass
class SplitConfig:
    kind: str = MISSING
    amount: float | None = MISSING
    minimum: int | None = MISSING
    block: int | None = MISSING
    assignments: int | None = MISSING
    map_file: str | None = MISSING
    map_key: str | None = MISSING
    map_classes: list[int] | None = MISSING


@dataclass
class SyntheticConfig:
    seed: int = MISSING
    smoothness: float = MISSING
    temperature: float = MISSING
    contrast: float = MISSING
    scale: float = MISSING
    shape: float = MISSING
    psf: float = MISSING
    noise: float = MISSING


@dataclass
class ResampleConfig:
    labels_file: str = MISSING
    labels_key: str = MISSING
    sides: str = MISSING
    sigma: float = MISSING
    noise: float = MISSING


@dataclass
class DataConfig:
    name: str = MISSING
    kind: str = MISSING
    manifest: str | None = MISSING
    cube_file: str | None = MISSING
    cube_key: str | None = MISSING
    layout: str = MISSING
    drop_bands: list[int] = MISSING
    height: int = MISSING
    width: int = MISSING
    bands: int = MISSING
    labels_from: str = MISSING
    labels_file: str | None = MISSING
    labels_key: str | None = MISSING
    train_labels_file: str | None = MISSING
    train_labels_key: str | None = MISSING
    test_labels_file: str | None = MISSING
    test_labels_key: str | None = MISSING
    abundances_file: str | None = MISSING
    abundances_key: str | None = MISSING
    class_names: list[str] = MISSING
    colours: list[str] = MISSING
    split: SplitConfig = MISSING
    resample: ResampleConfig | None = MISSING
    synthetic: SyntheticConfig | None = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    backbone: dict[str, Any] = MISSING


@dataclass
class MethodConfig:
    name: str = MISSING
    readout: str = MISSING
    model: dict[str, Any] = MISSING


@dataclass
class OptimConfig:
    lr: float = MISSING
    weight_decay: float = MISSING
    warmup: float = MISSING
    batch_size: int = MISSING
    precision: str = MISSING


@dataclass
class ScaleConfig:
    name: str = MISSING
    steps: int = MISSING


@dataclass
class OutputConfig:
    maps: bool = MISSING
    region: str = MISSING
    batch_size: int = MISSING
    checkpoint_every: int = MISSING


@dataclass
class PDMLConfig:
    paper: str = MISSING
    row: str = MISSING
    seed: int = MISSING
    variant: str = MISSING
    selection: str = MISSING
    patch_size: int = MISSING
    components: int = MISSING
    model: ModelConfig = MISSING
    method: MethodConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    scale: ScaleConfig = MISSING
    paths: PathsConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: Loggers = MISSING
    output: OutputConfig = MISSING
    launcher: LauncherConfig = MISSING


rows.register(Path(__file__).parent, PDMLConfig)
