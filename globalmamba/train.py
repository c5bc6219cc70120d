"""One run of GlobalMamba or of a baseline: images -> training -> scores and checkpoint.

    make reproduce-globalmamba ROWS=cifar10-gm,cifar10-vim SCALE=lite DATA_ROOT=...

``run`` is what the launcher calls for a row and seed, ``seconds_of_run`` what it prints the cost from.
"""

import os
import time
from itertools import cycle, islice
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from globalmamba.data import EvaluationBatches, training_data
from globalmamba.evaluate import arithmetic, device_of, score, speed
from globalmamba.kernels.selective_scan.op import BACKENDS, selective_scan
from globalmamba.model import build_model, parameters_of
from globalmamba.module import ClassificationModule, TrainingData
from shared.errors import UserError
from shared.run.callbacks import AtomicCheckpointIO, Resumption

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def require_device(cfg) -> None:
    """Raise UserError where the config asks for an accelerator that is not here."""
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={cfg.trainer.accelerator}, but PyTorch sees no GPU here: set trainer.accelerator=auto"
        )


def require_precision(cfg) -> None:
    """Raise UserError for a precision that this device has no arithmetic for."""
    precision = cfg.optim.precision
    if precision not in PRECISIONS:
        raise UserError(
            f"optim.precision={precision} is not known here: choose one of {', '.join(PRECISIONS)} "
            "(float16 needs a gradient scaler, which does not go with skipping steps that are not finite)"
        )
    if precision == "bf16-mixed" and device_of(cfg).type == "cpu":
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise UserError(
                "this CPU has no bfloat16 arithmetic: set optim.precision=32-true, or train on a GPU"
            )


def require_backend(cfg) -> None:
    """Raise UserError where ``trainer.backend`` is unknown or cannot run on this device."""
    backend, one = cfg.trainer.backend, torch.zeros(1, 1, 1, device=device_of(cfg))
    if backend not in BACKENDS:
        raise UserError(f"trainer.backend={backend} is not known here: choose one of {', '.join(BACKENDS)}")
    try:
        selective_scan(one, one, one[0], one, one, backend=backend)
    except RuntimeError as error:
        raise UserError(f"{' '.join(str(error).split())}: set trainer.backend=auto") from error


def prepare(cfg) -> tuple[ClassificationModule, TrainingData]:
    """Return all that a run trains with, as a function of the config alone; raises UserError for bad input."""
    require_device(cfg)
    require_precision(cfg)
    require_backend(cfg)
    torch.manual_seed(cfg.seed)
    network = build_model(cfg)
    data = training_data(cfg)
    return ClassificationModule(network, cfg, data.sampler.steps), data


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
        found.append(WandbLogger(project="globalmamba", name=name, save_dir=folder, offline=offline))
    return found


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

    Of a batch that several devices share, one device's part is timed.
    """
    module, data = prepare(cfg)
    optimizer, device = module.configure_optimizers()["optimizer"], device_of(cfg)
    module.to(device)
    times, share = [], max(cfg.optim.batch_size // cfg.trainer.devices, 1)
    for batch in islice(cycle(data.train_dataloader()), 4):  # the first one warms up
        begin = time.perf_counter()
        with arithmetic(cfg, device):
            loss = module.loss({name: value[:share].to(device) for name, value in batch.items()}, 0)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    rate = speed(cfg, module.model, device)["images_per_second"]
    return data.sampler.steps * float(np.median(times[1:])) + EvaluationBatches(cfg).images / rate
