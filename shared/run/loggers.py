"""Where the curves of a run go: CSV, TensorBoard, Weights & Biases, as ``logging`` in the config says."""

import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger


def loggers(cfg, folder: Path) -> list:
    """Return the loggers that the config switches on; the CSV one gets a new folder at every start.

    It empties the folder it is given, and a resumed run must keep the curve of its first part.
    """
    found = []
    if cfg.logging.csv:
        starts = len(list(folder.glob("curves/*")))
        found.append(CSVLogger(folder, name="curves", version=f"start{starts}"))
    if cfg.logging.tensorboard:
        found.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if cfg.logging.wandb:
        offline = os.environ.get("WANDB_MODE", "offline") != "online"
        name = f"{cfg.row}-seed{cfg.seed}"
        found.append(WandbLogger(project=cfg.paper, name=name, save_dir=folder, offline=offline))
    return found
