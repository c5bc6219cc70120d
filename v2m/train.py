"""One run of V2M or of a baseline: images -> training -> scores and checkpoint.

    make reproduce-v2m ROWS=cifar10-v2m,cifar10-vim SCALE=lite DATA_ROOT=...

``run`` is what the launcher calls for a row and seed, ``seconds_of_run`` what it prints the cost from.
"""

import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from shared.run.fit import fit as train
from shared.run.fit import seconds_of_training
from shared.run.machine import device_of, require_device, require_precision
from shared.run.training_data import TrainingData
from v2m.data import evaluation_batches, training_data
from v2m.evaluate import score, speed
from v2m.machine import require_backend
from v2m.model import build_model, parameters_of, require_task
from v2m.module import ClassificationModule


def prepare(cfg) -> tuple[ClassificationModule, TrainingData]:
    """Return all that a run trains with, as a function of the config alone; raises UserError for bad input."""
    require_task(cfg)
    require_device(cfg)
    require_precision(cfg)
    require_backend(cfg)
    torch.manual_seed(cfg.seed)
    network = build_model(cfg)
    data = training_data(cfg)
    return ClassificationModule(network, cfg, data.sampler.steps), data


def fit(cfg, module: ClassificationModule, data: TrainingData, folder: Path, callbacks=()) -> pl.Trainer:
    """Train for the steps of the config, going on from ``folder/last.ckpt`` where there is one."""
    return train(cfg, module, data, folder, callbacks, gradient_clip_val=cfg.optim.clip_norm)


def run(cfg, folder: Path) -> dict | None:
    """Train and score one row and seed into ``folder``; returns the metrics (None on ranks other than 0)."""
    module, data = prepare(cfg)
    begin = time.perf_counter()
    trainer = fit(cfg, module, data, folder)
    seconds = time.perf_counter() - begin
    if not trainer.is_global_zero:
        return None
    device = trainer.strategy.root_device  # Lightning hands the network back on the CPU
    metrics = score(cfg, module.model, device) | speed(cfg, module.model, device)
    if module.average is not None:
        metrics["top1_average"] = score(cfg, module.average, device)["top1"]
    metrics["train_images"] = float(len(data.batches))
    metrics["train_seconds"] = seconds
    metrics["parameters"] = float(parameters_of(module.model))
    metrics["skipped_steps"] = float(module.skipped_steps)
    return metrics


def seconds_of_run(cfg) -> float:
    """Estimate the seconds of a whole run from three timed steps and one timed batch of scoring.

    Of a batch that several devices share, one device's part is loaded and timed.
    """
    module, data = prepare(cfg)
    seconds = seconds_of_training(cfg, module, data)
    rate = speed(cfg, module.model, device_of(cfg))["images_per_second"]
    return seconds + evaluation_batches(cfg).samples / rate
