"""Types of what every paper's configuration has, and from a composed one to its hash, run folder and evidence.

Types only: every value stands in YAML. ``trainer``, ``logger`` and Hydra's own part come from
``shared/training/configs``, which is on the search path of every paper; everything else from the paper's ``configs``.
"""

import functools
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf

from shared.data.manifest import load_manifest, manifest_sha256
from shared.records import config_sha256, read_record, record_path

_folders: dict[str, Path] = {}  # of the papers whose config.py was imported


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


class SharedConfigs(SearchPathPlugin):
    """Puts the groups that every paper has, ``trainer`` and ``logger``, on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="shared", path="pkg://shared.training.configs")


def register_schema(folder: Path, schema: type) -> None:
    """Make known to Hydra what a paper's configuration may hold; an unknown key is an error from then on.

    Stores ``<paper>_schema`` and ``<paper>_evaluation_schema``, the first entries of the defaults of ``train.yaml``
    and ``evaluate.yaml``. ``folder``: of the paper, whose name is the paper's.
    """
    _folders[folder.name] = folder
    store = ConfigStore.instance()
    store.store(name=f"{folder.name}_schema", node=schema)
    store.store(name=f"{folder.name}_evaluation_schema", node=evaluation_schema(schema))


def root_of(cfg: DictConfig) -> Path:
    """Return the folder that holds the paper: relative paths of a configuration begin there."""
    return _folders[cfg.paper].parent


@functools.cache
def _manifest_digest(name: str) -> str:
    return manifest_sha256(load_manifest(name))


def hash_of(cfg: DictConfig) -> tuple[str, str | None]:
    """Return the sha256 of what can change a number, and that of the data manifest (None without one)."""
    tree = OmegaConf.to_container(cfg, resolve=True)
    manifest = tree["data"].get("manifest")
    digest = _manifest_digest(manifest) if manifest else None
    tree["data"]["manifest_sha256"] = digest
    neutral = _folders[cfg.paper] / "configs" / "neutral.yml"
    return config_sha256(tree, yaml.safe_load(neutral.read_text(encoding="utf-8")) or {}), digest


def evidence_path(cfg: DictConfig) -> Path:
    """Return where the run record of a composed configuration belongs."""
    return record_path(root_of(cfg) / cfg.paths.results, cfg.scale.name, cfg.row, cfg.seed)


def has_evidence(cfg: DictConfig) -> bool:
    """Return whether the record of this very configuration is there; one of another is stale, a diverged one none."""
    path = evidence_path(cfg)
    record = read_record(path) if path.exists() else None
    return record is not None and record.config_sha256 == hash_of(cfg)[0] and not record.is_diverged


def run_folder(cfg: DictConfig) -> Path:
    """Return the folder of a run: checkpoint, curves, pictures, Hydra's notes.

    It carries the configuration's hash, so that no checkpoint of another configuration is continued from.
    """
    runs = root_of(cfg) / cfg.paths.runs
    return runs / cfg.scale.name / cfg.row / f"seed{cfg.seed}-{hash_of(cfg)[0][:8]}"


def failure_path(cfg: DictConfig) -> Path:
    """Return where a run that failed says why: a sentence and, unless the user can fix it, the traceback."""
    return run_folder(cfg) / "failed.txt"


def _resolve_run_folder(*, _root_: DictConfig) -> str:
    # Hydra's own part is in the tree while a job starts; it has no hash and interpolates what is not known yet.
    return str(run_folder(OmegaConf.masked_copy(_root_, [key for key in _root_ if key != "hydra"])))


Plugins.instance().register(SharedConfigs)
OmegaConf.register_new_resolver("run_folder", _resolve_run_folder, replace=True)
OmegaConf.register_new_resolver("runs_folder", lambda *, _root_: str(root_of(_root_) / _root_.paths.runs), replace=True)
