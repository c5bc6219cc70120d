"""What a paper offers to the ledger. Outside of tests, this is the only file that imports a paper by its name.

A paper is a folder with

- ``metafile.yml``, its ledger (``ledger.py``);
- ``configs/``: ``train.yaml``, ``evaluate.yaml``, their groups, ``experiment/<claimed row>.yaml``, ``neutral.yml``;
- ``config.py``, the types of its configuration; importing it calls ``rows.register`` and builds no network;
- ``train.py``, the Hydra application, and ``seconds_of_run(cfg) -> float``, estimated from a few timed steps;
- ``evaluate.py``, the Hydra application that scores ``ckpt`` without training;
- ``model.py`` with ``count(cfg) -> dict``, where a claim states ``parameters`` or ``flops``: what a configuration's
  network counts, by these names, with nothing computed;
- ``tools/data_check.py`` with ``check_variables(manifest, entry, root) -> str | None``, where it knows more of a data
  file than its checksum: what is to be said of it, None for a file that it does not read, UserError for a wrong one;
- ``costs.py`` with ``memory_of(cfg) -> dict``, where a configuration has ``dense``: what a device holds in training;
- ``interpretations.py`` with ``tables() -> dict[str, list[Table]]``, where the sources leave something open: by the
  name of their marker in INTERPRETATIONS.md, what each interpretation counts.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.claims.ledger import Ledger, load_ledger
from shared.errors import UserError


@dataclass(frozen=True)
class Paper:
    """A paper's folder ``root/name``, with ``root`` on Python's path."""

    name: str
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def ledger(self) -> Ledger:
        return load_ledger(self.root, self.name)

    def register(self) -> None:
        """Make the paper's schema and rows known to Hydra."""
        importlib.import_module(f"{self.name}.config")

    def count(self, cfg) -> dict[str, float]:
        """Return parameters and FLOPs of a configuration's network; UserError for a paper that does not count."""
        counter = getattr(importlib.import_module(f"{self.name}.model"), "count", None)
        if counter is None:
            raise UserError(f"{self.name}/model.py has no count(cfg), but {cfg.row} claims what it counts: add it.")
        return counter(cfg)

    def memory_of(self, cfg) -> dict[str, int]:
        """Return what a device holds while a configuration with ``dense`` is trained."""
        return importlib.import_module(f"{self.name}.costs").memory_of(cfg)

    def seconds_of_run(self, cfg) -> float:
        """Return the estimated seconds of a run; UserError for what would keep it from starting."""
        return importlib.import_module(f"{self.name}.train").seconds_of_run(cfg)

    @property
    def check_variables(self) -> Callable[..., str | None] | None:
        """What the paper says of a data file; None for a paper that checks none."""
        if not (self.folder / "tools/data_check.py").is_file():
            return None
        return importlib.import_module(f"{self.name}.tools.data_check").check_variables

    def interpretation_tables(self) -> dict[str, list[Any]]:
        """Return the tables of ``interpretations.py`` by marker name; none without that file."""
        if not (self.folder / "interpretations.py").is_file():
            return {}
        return importlib.import_module(f"{self.name}.interpretations").tables()

    def command(self, application: str) -> list[str]:
        """Return the command line of an application, ``train`` or ``evaluate``."""
        return [sys.executable, "-m", f"{self.name}.{application}"]


def paper_names(root) -> list[str]:
    """Return the papers that have a ledger, in alphabetical order."""
    return sorted(path.parent.name for path in Path(root).glob("*/metafile.yml"))


def load_paper(root, name: str) -> Paper:
    """Return a paper; UserError for one that is not there."""
    names = paper_names(root)
    if name not in names:
        raise UserError(f"there is no paper {name!r} in {root}: choose one of {', '.join(names) or 'none'}")
    return Paper(name, Path(root))
