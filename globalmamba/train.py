"""One run of the paper's network or of a baseline: images -> training -> scores and checkpoint.

    python -m <paper>.train +experiment=ROW seed=0 paths.data_root=...

``run`` trains and scores a row and seed, ``seconds_of_run`` estimates what that takes.
"""

import time
from pathlib import Path

import hydra
import lightning.pytorch as pl
import torch

from shared.dense import run as dense
from shared.training.application import command, run_job
from shared.training.checks import device_of
from shared.training.fit import TrainingData, seconds_of_training
from shared.training.fit import fit as train
from shared.training.validation import Validation

from .backbone import build_backbone, weights_name
from .checks import check
from .config import CONFIGS
from .data import evaluation_batches, training_data
from .evaluate import score, speed
from .model import build_model
from .model_base import parameters_of
from .module import ClassificationModule
from .schema import ClassificationConfig


def prepare(cfg: ClassificationConfig) -> tuple[ClassificationModule, TrainingData]:
    """Return all that a run trains with, as a function of the config alone; raises UserError for bad input."""
    torch.manual_seed(cfg.seed)
    network = build_model(cfg)
    data = training_data(cfg)
    return ClassificationModule(network, cfg, data.sampler.steps), data


def fit(
    cfg: ClassificationConfig, module: ClassificationModule, data: TrainingData, folder: Path, callbacks=()
) -> pl.Trainer:
    """Train for the steps of the config, going on from ``folder/last.ckpt`` where there is one."""
    return train(cfg, module, data, folder, callbacks, gradient_clip_val=cfg.optim.clip_norm)


def run(cfg: ClassificationConfig, folder: Path) -> dict | None:
    """Train and score one row and seed into ``folder``; returns the metrics (None on ranks other than 0)."""
    if cfg.dense is not None:
        metrics = dense.run(cfg, build_backbone(cfg), folder)
        return metrics and metrics | {"weights": weights_name(cfg)}
    module, data = prepare(cfg)
    begin = time.perf_counter()
    validation = Validation(cfg, evaluation_batches(cfg), data.sampler)
    trainer = fit(cfg, module, data, folder, [validation])
    seconds = time.perf_counter() - begin
    if not trainer.is_global_zero:
        return None
    device = trainer.strategy.root_device  # Lightning hands the network back on the CPU
    metrics = score(cfg, module.model, device) | speed(cfg, module.model, device)
    last = {"": metrics}
    if module.average is not None:
        last["_average"] = score(cfg, module.average, device)
    metrics = metrics | validation.with_best(last)
    metrics["train_images"] = float(len(data.batches))
    metrics["train_seconds"] = seconds
    metrics["parameters"] = float(parameters_of(module.model))
    metrics |= module.step_counts()
    return metrics


def seconds_of_run(cfg: ClassificationConfig) -> float:
    """Estimate the seconds of a whole run, validation included, from three timed steps and a timed batch of scoring.

    Of a batch that several devices share, one device's part is loaded and timed.
    """
    if cfg.dense is not None:
        return dense.seconds_of_run(cfg, build_backbone(cfg))
    module, data = prepare(cfg)
    seconds = seconds_of_training(cfg, module, data)
    rate = speed(cfg, module.model, device_of(cfg))["images_per_second"]
    test = evaluation_batches(cfg)
    scorings = (1 + len(Validation(cfg, test, data.sampler).epochs)) * (1 + (module.average is not None))
    return seconds + scorings * test.samples / rate


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: ClassificationConfig) -> float | None:
    return run_job(cfg, run, check)


if __name__ == "__main__":
    # Under its own name: a launcher that sends jobs to processes would otherwise copy all of this module to them.
    from .train import main

    main()
