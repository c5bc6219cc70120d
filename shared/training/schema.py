"""Types of the parts of a configuration that every paper has. Types only: every value stands in YAML.

``trainer``, ``logger`` and Hydra's own part come from ``shared/training/configs``, which a paper's ``train.yaml`` puts
on Hydra's search path; everything else from the paper's ``configs``.
"""

from dataclasses import dataclass, make_dataclass
from typing import Any

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
    num_nodes: int = MISSING
    strategy: str = MISSING
    accumulate_grad_batches: int = MISSING
    workers: int = MISSING


@dataclass
class LauncherConfig:
    seeds: list[int] = MISSING


Loggers = dict[str, Any]  # name -> what Hydra instantiates, None for one that is switched off


def evaluation_schema(schema: type) -> type:
    """Return the schema of ``evaluate.yaml``: that of a training, the checkpoint, and the folder of the pictures."""
    fields = [("ckpt", str | None, MISSING), ("out", str | None, MISSING)]
    return make_dataclass(f"{schema.__name__}Evaluation", fields, bases=(schema,))
