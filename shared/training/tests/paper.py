"""A throw-away paper in a folder of its own: configurations, a ledger, and a training that takes no time.

It is imported and started as any paper is. ``behaviour`` in its configuration says what its training does.
"""

import importlib
import logging
import os
import sys
from pathlib import Path

import pytest

from shared.environment import repository_root

FILES = {
    "__init__.py": "",
    "config.py": """
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from omegaconf import MISSING
from shared.claims import rows
from shared.training.config import LauncherConfig, Loggers, PathsConfig, TrainerConfig

@dataclass
class FakeConfig:
    paper: str = MISSING
    row: str = MISSING
    seed: int = MISSING
    variant: str = MISSING
    selection: str = MISSING
    width: int = MISSING
    gate: bool = MISSING
    behaviour: str = MISSING
    model: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    optim: dict[str, Any] = MISSING
    scale: dict[str, Any] = MISSING
    output: dict[str, Any] = MISSING
    paths: PathsConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: Loggers = MISSING
    launcher: LauncherConfig = MISSING

CONFIGS = str(Path(__file__).parent / "configs")
rows.register(Path(__file__).parent, FakeConfig)
""",
    "train.py": """
import os, time
import hydra
from fake.config import CONFIGS
from shared.errors import UserError
from shared.training.application import command, run_job

def seconds_of_run(cfg):
    return 2.0

def run(cfg, folder):
    (folder / "started").write_text(str(os.getpid()))
    if cfg.behaviour == "refuses":
        raise UserError("cube[1].mat\\nis missing: put it there")
    if cfg.behaviour == "fails":
        raise ZeroDivisionError("of ours")
    if cfg.behaviour == "waits":
        time.sleep(300)
    return {"n_test": 10.0, "oa": 0.25 + cfg.seed / 100}

@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg):
    return run_job(cfg, run)

if __name__ == "__main__":
    main()
""",
    "evaluate.py": """
import hydra
from fake.config import CONFIGS
from shared.training.application import command, run_evaluation

def score(cfg, checkpoint, folder):
    folder.mkdir()
    return {"oa": 0.875, "per_class": [1.0, None], "classes_scored": "1 of 2", "n_test": 7.0}

@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg):
    run_evaluation(cfg, score)

if __name__ == "__main__":
    main()
""",
    "configs/train.yaml": """
defaults: [fake_schema, trainer: default, logger: none, model: small, scale: demo, _self_]
paper: fake
row: default
seed: 0
variant: as_written
selection: last-epoch
width: 3
gate: false
behaviour: trains
data: {manifest: null, split: {amount: 5}}
optim: {lr: 0.1, precision: 32-true, batch_size: 4}
output: {checkpoint_every: 2}
paths: {data_root: null, results: fake/results, runs: runs}
hydra:
  run: {dir: "${run_folder:}"}
  sweep: {dir: "${runs_folder:}/multirun", subdir: "${run_folder:}"}
""",
    "configs/evaluate.yaml": """
defaults: [train, fake_evaluation_schema, _self_]
ckpt: null
out: null
hydra: {output_subdir: null, run: {dir: .}, job_logging: {root: {handlers: [console]}}}
""",
    "configs/model/small.yaml": "name: small\n",
    "configs/model/large.yaml": "name: large\n",
    "configs/scale/demo.yaml": "# @package _global_\nscale: {name: demo, steps: 4}\nlauncher: {seeds: [0]}\n",
    "configs/scale/lite.yaml": "# @package _global_\nscale: {name: lite, steps: 9}\nlauncher: {seeds: [0, 1, 2]}\n",
    "configs/neutral.yml": "gate: false\n",
    "metafile.yml": """
Collections: [{Name: Fake}]
Models: []
Demo:
  - Group: Digits
    Compose: {scale: demo}
    Metrics: [oa]
    Rows:
      - {Row: plain, Label: plain}
      - {Row: new, Label: new, Compose: {model: large, optim.lr: 0.2}, Baseline: plain, Formerly: older}
Lite:
  - Group: Digits
    Compose: {scale: lite, data.manifest: digits}
    Metrics: [oa]
    Rows: [{Row: lite-plain, Label: plain}]
""",
}


def write_paper(root: Path) -> Path:
    """Write the package ``fake`` below ``root`` and return its folder."""
    for name, text in FILES.items():
        path = root / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "fake"


def forget_paper() -> None:
    """Make Python import the paper anew, from wherever it is then."""
    for name in [name for name in sys.modules if name.split(".")[0] == "fake"]:
        del sys.modules[name]


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """The folder of the paper; its modules are those of this test."""
    folder = write_paper(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(repository_root())]))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    forget_paper()
    importlib.import_module("fake.config")
    yield folder
    forget_paper()


@pytest.fixture
def fake(paper):
    """The module ``fake.train``; a test replaces ``run`` and ``seconds_of_run``."""
    return importlib.import_module("fake.train")


@pytest.fixture
def config(paper):
    """Compose a row of the paper: (row, seed, overrides) -> configuration."""
    from shared.claims.compose import row_config
    from shared.claims.protocol import Paper

    def compose(row: str = "plain", seed: int = 0, *overrides: str):
        return row_config(Paper("fake", paper.parent), row, seed, overrides)

    return compose


@pytest.fixture
def start(paper, monkeypatch):
    """Start an application of the paper in this process: command line -> exit code."""

    def run(command: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", command[2:])
        handlers, level = list(logging.root.handlers), logging.root.level
        try:
            importlib.import_module(command[2]).main()
        except SystemExit as ended:
            return ended.code
        finally:
            logging.root.handlers[:] = handlers  # Hydra put its own in their place
            logging.root.setLevel(level)
        return 0

    return run


def quick(cfg, folder: Path) -> dict:
    """Stand in for a training."""
    return {"n_test": 10.0, "oa": 0.25 + cfg.seed / 100}
