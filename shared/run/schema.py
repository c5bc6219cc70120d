"""Types of the parts of a configuration that every paper has. Types only: every value stands in a paper's YAML."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class PathsConfig:
    data_root: str | None = MISSING
    results: str = MISSING
    runs: str = MISSING


@dataclass
class TrainerConfig:
    accelerator: str = MISSING
    devices: int = MISSING
    strategy: str = MISSING
    workers: int = MISSING


@dataclass
class LoggingConfig:
    csv: bool = MISSING
    tensorboard: bool = MISSING
    wandb: bool = MISSING


@dataclass
class LauncherConfig:
    seeds: list[int] = MISSING
