"""Rows as compositions: what the ledger lists under Lite, Demo and Full, as experiments that Hydra composes.

A claimed row has a file of its own, ``configs/experiment/<row>.yaml``. The other rows are stored in Hydra's
ConfigStore, so that ``+experiment=<row>`` means the same for both, and Hydra's help lists all of them.
"""

from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from shared.claims.ledger import read_ledger
from shared.training.config import register_schema


_registered: Path | None = None  # the paper whose rows Hydra knows


def experiment_node(configs: Path, row: str, composition: dict[str, Any]) -> dict[str, Any]:
    """Return what an experiment file of a row would hold.

    A key of ``composition`` that names a folder of ``configs`` chooses from that group; any other, with dots for what
    lies deeper, sets a value.
    """
    node: dict[str, Any] = {"defaults": [], "row": row}
    for key, value in composition.items():
        if (configs / key).is_dir():
            node["defaults"].append({f"override /{key}": value})
            continue
        *parents, last = key.split(".")
        place = node
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = _plain(value)
    return node


def _plain(value: Any) -> Any:
    """Return a value without what the ledger's numbers remember of how they were printed."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, float) else value


def register(folder: Path, schema: type) -> None:
    """Make a paper known to Hydra: the types of its configuration, and the rows of its ledger as experiments.

    Called again it does nothing, unless another paper, which may have a row of the same name, was registered since.
    """
    global _registered
    if folder == _registered:
        return
    _registered = folder
    register_schema(folder, schema)
    ledger, store = read_ledger(folder / "metafile.yml"), ConfigStore.instance()
    for row in ledger.own_rows:
        node = experiment_node(folder / "configs", row.Row, row.Compose)
        store.store(group="experiment", name=row.Row, node=node, package="_global_")
