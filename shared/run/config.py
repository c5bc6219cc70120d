"""Composing the configuration of a row, and what of it is hashed into the evidence."""

import difflib
import importlib
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.data.manifest import load_manifest, manifest_sha256
from shared.errors import UserError
from shared.metrics.record import config_sha256

PAPERS = ("globalmamba", "v2m", "idml", "pdml", "opera")
SCALES = ("demo", "lite", "full")


def repository_root() -> Path:
    """Return the folder that holds the papers."""
    return Path(__file__).resolve().parents[2]


def papers() -> list[str]:
    """Return the papers that stand in this repository, those with a ledger."""
    return [paper for paper in PAPERS if (repository_root() / paper / "metafile.yml").is_file()]


def config_folder(paper: str) -> Path:
    """Return the folder of the paper's configs; UserError for a paper that is not here."""
    if paper not in papers():
        raise UserError(f"there is no paper {paper!r} here: choose one of {', '.join(papers())}")
    # Importing it registers the types of the configuration.
    importlib.import_module(f"{paper}.config")
    return repository_root() / paper / "configs"


def require_row(paper: str, row: str) -> None:
    """Raise UserError, with the nearest names, where the row has no experiment file."""
    folder = config_folder(paper) / "experiment"
    if not (folder / f"{row}.yaml").is_file():
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        near = difflib.get_close_matches(row, names, 3, 0.3) or names[:3]
        raise UserError(
            f"unknown row {row!r}: {folder.relative_to(repository_root())} has no {row}.yaml; "
            f"did you mean {', '.join(near)}?"
        )


def compose(paper: str, overrides: list[str], **keywords) -> DictConfig:
    """Compose ``train.yaml`` of a paper; UserError, in one sentence, for whatever is wrong with the config."""
    folder = config_folder(paper)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            cfg = hydra_compose("train", overrides, **keywords)
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=not keywords)
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        root = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        reason = " ".join(str(root).split("\n    full_key")[0].split())
        raise UserError(
            f"{folder.relative_to(repository_root())}/train.yaml with {' '.join(overrides)}: {reason}; "
            "mend the key or value"
        ) from error


def row_overrides(paper: str, row: str, seed: int, overrides: list[str]) -> list[str]:
    """Return the Hydra overrides that stand for a row and seed; UserError for an unknown row."""
    require_row(paper, row)
    return [f"+experiment={row}", f"seed={seed}", *overrides]


def hash_of(cfg: DictConfig) -> tuple[str, str | None]:
    """Return the sha256 of what can change a number, and that of the data manifest (None without one)."""
    tree: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    manifest = tree["data"].get("manifest")
    digest = manifest_sha256(load_manifest(manifest)) if manifest else None
    tree["data"]["manifest_sha256"] = digest
    neutral = config_folder(cfg.paper) / "neutral.yml"
    return config_sha256(tree, yaml.safe_load(neutral.read_text()) or {}), digest


def expected_hash(paper: str, row: str, seed: int, overrides: list[str] | None = None) -> str:
    """Return the config hash that evidence of a row and seed must carry; UserError for a row without config."""
    return hash_of(compose(paper, row_overrides(paper, row, seed, overrides or [])))[0]
