"""Types of the toy paper's configuration."""

from dataclasses import make_dataclass
from pathlib import Path

from omegaconf import MISSING

from shared.claims import rows
from shared.training.config import LauncherConfig, Loggers, PathsConfig, TrainerConfig

CONFIGS = str(Path(__file__).parent / "configs")


def typed(kind: str, /, **types: type) -> type:
    return make_dataclass(kind, [(key, type_, MISSING) for key, type_ in types.items()])


parts = {"data": typed("Data", manifest=str), "model": typed("Model", dropout=float)}
parts["optim"] = typed("Optim", lr=float, batch_size=int, precision=str)
parts |= {"scale": typed("Scale", name=str, steps=int), "output": typed("Output", checkpoint_every=int)}
parts |= {"paths": PathsConfig, "trainer": TrainerConfig, "logger": Loggers, "launcher": LauncherConfig}
names = dict.fromkeys(("paper", "row", "variant", "selection"), str)
rows.register(Path(__file__).parent, typed("ToyConfig", seed=int, **names, **parts))
