"""Rows as compositions: what the ledger lists under Lite, Demo and Full, as experiments that Hydra composes.

A claimed row has a file of its own, ``configs/experiment/<row>.yaml``. The other rows come from the ledger by a config
source (https://hydra.cc/docs/advanced/plugins/overview), so that ``+experiment=<row>`` means the same for both.
"""

import json
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from shared.claims.ledger import OwnRow, load_ledger
from shared.dense.config import GROUP
from shared.training.config import register_schema

FOLDER = "experiment"


def experiment_node(configs: Path, row: str, composition: dict[str, Any]) -> DictConfig:
    """Return what an experiment file of a row would hold.

    A key of ``composition`` that names a folder of ``configs`` chooses from that group; any other, with dots for what
    lies deeper, sets a value.
    """
    node = OmegaConf.create({"defaults": [], "row": row})
    # Through JSON, numbers forget how the ledger printed them.
    for key, value in json.loads(json.dumps(composition)).items():
        if (configs / key).is_dir() or key == GROUP.name:
            node.defaults.append({f"override /{key}": value})
        else:
            OmegaConf.update(node, key, value)
    return node


class LedgerSource(ConfigSource):
    """The rows of ``<paper>/metafile.yml`` as the group ``experiment``; the path is the paper's folder."""

    @staticmethod
    def scheme() -> str:
        return "ledger"

    def _rows(self) -> dict[str, OwnRow]:
        folder = Path(self.path)
        return {f"{FOLDER}/{row.Row}": row for row in load_ledger(folder.parent, folder.name).own_rows}

    def available(self) -> bool:
        return (Path(self.path) / "metafile.yml").is_file()

    def load_config(self, config_path: str) -> ConfigResult:
        row = self._rows()[config_path.removesuffix(".yaml")]
        node = experiment_node(Path(self.path) / "configs", row.Row, row.Compose)
        return ConfigResult(self.provider, self.full_path(), node, {"package": "_global_"})

    def is_group(self, config_path: str) -> bool:
        return config_path.rstrip("/") in ("", FOLDER)

    def is_config(self, config_path: str) -> bool:
        return config_path.removesuffix(".yaml") in self._rows()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path.rstrip("/") == FOLDER:
            return sorted(row.Row for row in self._rows().values() if results_filter != ObjectType.GROUP)
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
