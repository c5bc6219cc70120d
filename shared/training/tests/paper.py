"""A throw-away paper in a folder of its own: configurations, a ledger with three rows, and a training that takes no time.

It is imported and started as any paper is. ``behaviour`` in its configuration says what its training does.
"""

import sys
from pathlib import Path

FILES = {
    "__init__.py": "",
    "config.py": '''
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from omegaconf import MISSING
from shared.claims import rows
from shared.training.schema import LauncherConfig, Loggers, PathsConfig, TrainerConfig

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

rows.register(Path(__file__).parent, FakeConfig)
''',
    "train.py": '''
import os, signal, time
import hydra
from fake.config import FakeConfig
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
@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg):
    return run_job(cfg, run)

if __name__ == "__main__":
    main()
''',
    "evaluate.py": '''
import hydra
import fake.config
from shared.training.application import command
from shared.training.evaluation import run_evaluation

def score(cfg, checkpoint, folder):
    folder.mkdir()
    return {"oa": 0.875, "per_class": [1.0, None], "classes_scored": "1 of 2", "n_test": 7.0}

@command
@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg):
    run_evaluation(cfg, score)

if __name__ == "__main__":
    main()
''',
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
