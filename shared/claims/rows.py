"""Rows as compositions: what the ledger lists under Lite, Demo and Full, as experiments that Hydra composes.

A claimed row has a file of its own, ``configs/experiment/<row>.yaml``. The other rows come from the ledger by a config
source, so that ``+experiment=<row>`` means the same for both, and Hydra's help lists all of them.
https://hydra.cc/docs/advanced/plugins/overview says what a config source and a search path plugin are.
"""

from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from shared.claims.ledger import Ledger, read_ledger
from shared.training.config import register_schema

FOLDER = "experiment"


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


class LedgerSource(ConfigSource):
    """The rows of ``<paper>/metafile.yml`` as the group ``experiment``; the path is the paper's folder."""

    @staticmethod
    def scheme() -> str:
        return "ledger"

    def _ledger(self) -> Ledger:
        return read_ledger(Path(self.path) / "metafile.yml")

    def _row(self, config_path: str):
        group, _, name = config_path.rstrip("/").removesuffix(".yaml").partition("/")
        rows = self._ledger().own_rows if group == FOLDER else []
        return next((row for row in rows if row.Row == name), None)

    def available(self) -> bool:
        return (Path(self.path) / "metafile.yml").is_file()

    def load_config(self, config_path: str) -> ConfigResult:
        row = self._row(config_path)
        node = experiment_node(Path(self.path) / "configs", row.Row, row.Compose)
        header = {"package": "_global_"}
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(node), header)

    def is_group(self, config_path: str) -> bool:
        return config_path.rstrip("/") in ("", FOLDER)

    def is_config(self, config_path: str) -> bool:
        return self._row(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path.rstrip("/") == FOLDER:
            return sorted(row.Row for row in self._ledger().own_rows if results_filter != ObjectType.GROUP)
        return [FOLDER] if config_path == "" and results_filter != ObjectType.CONFIG else []


class LedgerOnSearchPath(SearchPathPlugin):
    """Puts the rows of the paper behind its ``configs`` folder on the search path of Hydra."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry in list(search_path.get_path()):
            folder = Path((entry.path or "").removeprefix("file://")).parent
            if entry.provider == "main" and (folder / "metafile.yml").is_file():
                search_path.append(provider="ledger", path=f"{LedgerSource.scheme()}://{folder}")


def register(folder: Path, schema: type) -> None:
    """Make a paper known to Hydra: the types of its configuration, and the rows of its ledger as experiments."""
    register_schema(folder, schema)
    for plugin in (LedgerSource, LedgerOnSearchPath):
        Plugins.instance().register(plugin)
