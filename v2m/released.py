"""What ``variant=as_released`` may stand for: a network and a script that were released, whole, and nothing else.

The rows of the ledger that say ``variant: as_released`` are the releases: the paper's own and those of its baselines.
``configs/variant/as_released.yaml`` sets one of them in one switch; a run of that variant has the values of ``model``
and ``optim`` of one of these rows, or is refused. Data, augmentation, length and seed are the user's.
"""

from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from shared.claims.compose import row_config
from shared.claims.protocol import load_paper
from shared.environment import repository_root
from shared.errors import UserError

from .schema import ClassificationConfig

PAPER = __name__.partition(".")[0]
VARIANT = "as_released"
# Two networks that differ in one of these are different networks, not one that is set otherwise.
KIND = ("_target_", "mixer._target_", "embed_dim", "depth")
SHOWN = 3  # contradictions in the sentence


def released_rows() -> list[str]:
    """Return the rows of the ledger that are as released, in its order."""
    rows = load_paper(repository_root(), PAPER).ledger.own_rows
    return [row.Row for row in rows if row.Compose.get("variant") == VARIANT]


def composed(row: str, seed: int) -> DictConfig:
    """Return the config of a row and seed, inside an application too, where Hydra runs already."""
    if GlobalHydra.instance().is_initialized():
        return hydra.compose("train", [f"+experiment={row}", f"seed={seed}"])
    return row_config(PAPER, row, seed)


def values(cfg: DictConfig) -> dict[str, Any]:
    """Return what a release sets, by dotted key: all of ``model`` but its name, and ``optim``."""
    flat: dict[str, Any] = {}
    tree = OmegaConf.to_container(cfg, resolve=True)
    ahead = [(key, tree[key]) for key in ("optim", "model")]
    while ahead:
        name, value = ahead.pop()
        if isinstance(value, dict):
            ahead += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            flat[name] = value
    flat.pop("model.name")  # a label
    return flat


def require_release(cfg: ClassificationConfig) -> None:
    """Raise UserError where ``variant`` is as_released and no release has this network, or has it set like this."""
    if cfg.variant != VARIANT:
        return
    own, rows = values(cfg), released_rows()
    differing = {}
    for row in rows:
        theirs = values(composed(row, cfg.seed))
        if all(own.get(f"model.network.{key}") == theirs.get(f"model.network.{key}") for key in KIND):
            keys = sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key))
            differing[row] = [
                f"{key} {theirs.get(key, 'not set')} instead of {own.get(key, 'not set')}" for key in keys
            ]
    if not differing:
        raise UserError(
            f"variant={VARIANT} is not implemented for a network like {cfg.model.name}: choose one of the rows "
            f"{', '.join(rows)}, or variant=as_written"
        )
    row = min(differing, key=lambda name: len(differing[name]))
    if differing[row]:
        raise UserError(
            f"variant={VARIANT} contradicts other settings: {row}, the nearest release, has "
            f"{', '.join(differing[row][:SHOWN])}{' and more' if len(differing[row]) > SHOWN else ''}; "
            f"take +experiment={row} without them, or variant=as_written"
        )
