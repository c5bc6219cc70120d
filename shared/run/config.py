"""Composing the configuration of a row, and what of it is hashed into the evidence."""

import difflib
import functools
import importlib
import re
from collections.abc import Sequence
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
from shared.metrics.ledger import papers as with_ledger
from shared.metrics.record import config_sha256

SCALES = ("demo", "lite", "full")


def repository_root() -> Path:
    """Return the folder that holds the papers."""
    return Path(__file__).resolve().parents[2]


def papers() -> list[str]:
    """Return the papers that stand in this repository, those with a ledger."""
    return with_ledger(repository_root())


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


def compose(paper: str, overrides: list[str]) -> DictConfig:
    """Compose ``train.yaml`` of a paper; UserError, in one sentence, for whatever is wrong with the config."""
    folder = config_folder(paper)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            cfg = hydra_compose("train", overrides)
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        root = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        reason = " ".join(str(root).split("\n    full_key")[0].split())
        raise UserError(
            f"{folder.relative_to(repository_root())}/train.yaml with {' '.join(overrides)}: {reason}; "
            "mend the key or value"
        ) from error


def row_overrides(paper: str, row: str, seed: int, overrides: Sequence[str]) -> list[str]:
    """Return the Hydra overrides that stand for a row and seed; UserError for an unknown row.

    Overrides change values: one that adds a key, takes one away or sets the seed is a UserError.
    """
    require_row(paper, row)
    for override in overrides:
        if override[:1] in ("+", "~"):
            raise UserError(
                f"{override}: the configuration has the keys of its YAML files; say key=value for one"
            )
        if override.split("=")[0].strip() == "seed":
            raise UserError(
                f"{override}: seeds are no override; say SEEDS= (--seeds) or SEED= (--seed) instead"
            )
    return [f"+experiment={row}", f"seed={seed}", *overrides]


def quoted(text: str) -> str:
    """Return a text as the value of a Hydra override, whatever signs it holds."""
    # In quotes, backslashes stand for themselves except before a quote: there, and at the end, each is doubled.
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


@functools.cache
def _composed(paper: str, row: str, overrides: tuple[str, ...]) -> DictConfig:
    return compose(paper, row_overrides(paper, row, 0, overrides))


def row_config(paper: str, row: str, seed: int, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the config of a row and seed, the caller's own copy; UserError as ``compose`` and for the row.

    Hydra takes a third of a second for a row, so a row is composed once a process and its seeds are copies.
    """
    cfg = _composed(paper, row, tuple(overrides)).copy()
    cfg.seed = seed
    return cfg


@functools.cache
def _manifest_digest(name: str) -> str:
    return manifest_sha256(load_manifest(name))


def hash_of(cfg: DictConfig) -> tuple[str, str | None]:
    """Return the sha256 of what can change a number, and that of the data manifest (None without one)."""
    tree: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    manifest = tree["data"].get("manifest")
    digest = _manifest_digest(manifest) if manifest else None
    tree["data"]["manifest_sha256"] = digest
    neutral = config_folder(cfg.paper) / "neutral.yml"
    return config_sha256(tree, yaml.safe_load(neutral.read_text()) or {}), digest


def expected_hash(paper: str, row: str, seed: int, overrides: Sequence[str] = ()) -> str:
    """Return the config hash that evidence of a row and seed must carry; UserError for a row without config."""
    return hash_of(row_config(paper, row, seed, overrides))[0]
