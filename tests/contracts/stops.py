"""Trainings that are ended before their last step, and what they consumed and left."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from shared.testing.contract import Contract


class Stopped(Exception):
    pass


class Stop(pl.Callback):
    """Ends a training before batch ``step``: by an exception, or by a signal to the process."""

    def __init__(self, step: int, signal: int | None = None):
        self.step, self.signal = step, signal

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            if self.signal is None:
                raise Stopped
            os.kill(os.getpid(), self.signal)


class StopLogger(Logger):
    """Sends a signal to the process when training number ``training`` of it logs ``step`` or a later one.

    A logger of the configuration, and so a way to stop an application at a step without changing it.
    """

    name = version = "stop"
    trainings = 0

    def __init__(self, save_dir: Path, training: int, step: int, signal: int):
        super().__init__()
        self.is_meant = StopLogger.trainings == training
        self.step, self.signal = step, signal
        StopLogger.trainings += 1

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.is_meant and step >= self.step:
            os.kill(os.getpid(), self.signal)

    def log_hyperparams(self, *arguments: Any) -> None:
        pass


def stop_at(training: int, step: int, signal: int) -> str:
    """Return the override that stops an application."""
    return f"+logger.stop={{_target_:{__name__}.StopLogger,training:{training},step:{step},signal:{int(signal)}}}"


def train_recording(
    contract: Contract, folder: Path, every: int, stop: pl.Callback | None = None
) -> tuple[dict[str, Tensor], Any, list]:
    """Train ``contract.steps`` steps with a checkpoint after every ``every``.

    Returns the weights, the further state, and every batch that was consumed as (epoch, samples).
    """
    torch.set_num_threads(1)
    more = [*contract.random, f"output.checkpoint_every={every}"]
    training = contract.prepare(contract.config(folder, *more, steps=contract.steps), folder)
    consumed, batches = [], type(training.data.batches)

    def recording(self, batch):
        consumed.append(batch)
        return batches.__getitem__(self, batch)

    training.data.batches.__class__ = type("Recording", (batches,), {"__getitem__": recording})
    training.fit([stop] if stop else [])
    return training.module.state_dict(), training.state(), consumed


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Compare tensors by name, bit for bit."""
    assert left.keys() == right.keys() and left
    for name, value in right.items():
        assert torch.equal(left[name], value), name
