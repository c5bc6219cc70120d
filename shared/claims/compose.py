"""Composing the configuration of a row outside of its application: for hashes, costs, counts and tests."""

import difflib
import functools
from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from shared.claims.protocol import Paper, load_paper
from shared.command_line import CONFIG_ERRORS, config_reason
from shared.environment import repository_root
from shared.errors import UserError

SCALES = ("demo", "lite", "full")


def quoted(text: str) -> str:
    """Return a text as the value of a Hydra override, whatever signs it holds."""
    return QuotedString(text, Quote.single).with_quotes()


def row_names(paper: Paper) -> list[str]:
    """Return all rows: those with an experiment file, then those of the ledger's lists."""
    files = sorted(path.stem for path in (paper.folder / "configs" / "experiment").glob("*.yaml"))
    return files + [row.Row for row in paper.ledger.own_rows]


def dense_rows(paper: Paper) -> list[str]:
    """Return the rows of detection and segmentation but for the demo's: each names its choice of ``dense`` itself."""
    folder, ledger = paper.folder / "configs" / "experiment", paper.ledger
    files = sorted(path.stem for path in folder.glob("*.yaml") if "/dense:" in path.read_text(encoding="utf-8"))
    return files + [row.Row for row in (*ledger.Full, *ledger.Lite) if "dense" in row.Compose]


def _paper(paper: Paper | str) -> Paper:
    """Return a paper, by its name one of this repository."""
    return load_paper(repository_root(), paper) if isinstance(paper, str) else paper


def compose(paper: Paper | str, overrides: Sequence[str], config: str = "train") -> DictConfig:
    """Compose ``train.yaml`` of a paper; UserError, in one sentence, for whatever is wrong with the configuration."""
    paper = _paper(paper)
    paper.register()
    try:
        with initialize_config_dir(str(paper.folder.resolve() / "configs"), version_base="1.3"):
            cfg = hydra_compose(config, list(overrides))
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            return cfg
    except CONFIG_ERRORS as error:
        given = " ".join([f"{paper.name}/configs/{config}.yaml with", *overrides])
        raise UserError(f"{given}: {config_reason(error)}") from error


def row_overrides(paper: Paper, row: str, seed: int, overrides: Sequence[str]) -> list[str]:
    """Return the Hydra overrides that stand for a row and seed; UserError for an unknown row, with the nearest names.

    Overrides change values: one that adds a key, takes one away or sets the seed is a UserError.
    """
    names = row_names(paper)
    if row not in names:
        near = ", ".join(difflib.get_close_matches(row, names, 3, 0.3) or names[:3])
        places = f"neither {paper.name}/metafile.yml nor {paper.name}/configs/experiment has it"
        raise UserError(f"unknown row {row!r}: {places}; did you mean {near}?")
    for override in overrides:
        if override[:1] in ("+", "~"):
            raise UserError(f"{override}: the configuration has the keys of its YAML files; say key=value for one")
        if override.split("=")[0].strip() == "seed":
            raise UserError(f"{override}: seeds are no override; say SEEDS= (--seeds) or SEED= (--seed) instead")
    return [f"+experiment={row}", f"seed={seed}", *overrides]


@functools.cache
def _composed(paper: Paper, row: str, overrides: tuple[str, ...]) -> DictConfig:
    return compose(paper, row_overrides(paper, row, 0, overrides))


def row_config(paper: Paper | str, row: str, seed: int, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the config of a row and seed, the caller's own copy; UserError as ``compose`` and for the row.

    Hydra takes a third of a second for a row, so a row is composed once a process and its seeds are copies.
    """
    cfg = _composed(_paper(paper), row, tuple(overrides)).copy()
    cfg.seed = seed
    return cfg
