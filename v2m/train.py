"""One run of V2M or of a baseline: images -> training -> scores and checkpoint.

    make reproduce-v2m ROWS=cifar10-v2m,cifar10-vim SCALE=lite DATA_ROOT=...

``run`` is what the launcher calls for a row and seed, ``seconds_of_run`` what it prints the cost from.
"""

import os
import time
from itertools import cycle, islice
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch

from shared.run.callbacks import AtomicCheckpointIO, Resumption
from shared.run.loggers import loggers
from shared.run.machine import arithmetic, device_of, require_device, require_precision, synchronise
from shared.run.training_data import TrainingData
from v2m.data import EvaluationBatches, training_data
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


def fit(cfg, module: ClassificationModule, data: TrainingData, folder: Path, callbacks=None) -> pl.Trainer:
    """Train for the steps of the config, going on from ``folder/last.ckpt`` where there is one."""
    checkpoint = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_steps=data.sampler.steps,
        max_epochs=-1,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        strategy=cfg.trainer.strategy,
        precision=cfg.optim.precision,
        gradient_clip_val=cfg.optim.clip_norm,
        logger=loggers(cfg, folder),
        callbacks=[Resumption(checkpoint, cfg.output.checkpoint_every, data.sampler), *(callbacks or [])],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=os.isatty(2),
        use_distributed_sampler=False,
        log_every_n_steps=10,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None)
    trainer.save_checkpoint(checkpoint)
    return trainer


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
    data.sampler.world_size = max(cfg.trainer.devices, 1)
    optimizer, device = module.configure_optimizers()["optimizer"], device_of(cfg)
    module.to(device)
    times = []
    for batch in islice(cycle(data.train_dataloader()), 4):  # the first one warms up
        begin = time.perf_counter()
        with arithmetic(cfg, device):
            loss = module.loss({name: value.to(device) for name, value in batch.items()}, 0)
        loss.backward()
        optimizer.step()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    rate = speed(cfg, module.model, device)["images_per_second"]
    return data.sampler.steps * float(np.median(times[1:])) + EvaluationBatches(cfg).images / rate
