"""A run of a detector or a segmenter on a backbone that a paper hands over: train, score, estimate, count."""

import time
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from shared.dense import data
from shared.dense.data import open_set
from shared.dense.model import build_model, config_of, library_of
from shared.dense.module import DenseModule
from shared.dense.pictures import draw_predictions
from shared.dense.scoring import predictions, score
from shared.dense.sources import SPLITS
from shared.dense.validation import DenseValidation
from shared.training.checkpoints import load_weights, read_checkpoint
from shared.training.checks import device_of, ranks_of
from shared.training.config import root_of
from shared.training.fit import TrainingData, fit, seconds_of_training

MAPS = 4  # of a backbone, whose widths do not matter here
TIMED = 3  # images that are scored to tell what a run costs


def cache_of(cfg) -> Path:
    """Return the folder for what is made of the data, beside the runs."""
    return root_of(cfg) / cfg.paths.runs / "dense-data"


def require_sets(cfg) -> None:
    """Raise UserError where images or annotations of a row are missing, damaged or others, before a pre-training."""
    library = library_of(cfg.dense)
    config = config_of(library, cfg.dense, [1] * MAPS)
    for split in SPLITS:
        open_set(library, config, cfg, split, cache_of(cfg))


def as_computed(cfg):
    """Return a configuration in whose ``optim.precision`` Lightning finds that of the detector or segmenter.

    ``optim`` is the pre-training's; the hash and the folder of a run are those of the configuration as it was.
    """
    cfg = cfg.copy()
    cfg.optim.precision = cfg.dense.optim.precision
    return cfg


def prepare(cfg, backbone: nn.Module) -> tuple[DenseModule, TrainingData]:
    """Return all that a run trains with; the heads are drawn by the seed. Raises UserError for bad input."""
    library = library_of(cfg.dense)
    config = config_of(library, cfg.dense, backbone.channels)
    torch.manual_seed(cfg.seed)
    model = build_model(library, config, backbone)
    batches = data.training_data(library, config, cfg, cache_of(cfg))
    return DenseModule(model, cfg, batches.sampler.steps), batches


def train(cfg, module: DenseModule, batches: TrainingData, folder: Path, callbacks=()) -> pl.Trainer:
    """Train for the steps of the config, going on from ``folder/last.ckpt`` where there is one."""
    return fit(cfg, module, batches, folder, callbacks, gradient_clip_val=cfg.dense.optim.clip_norm)


def run(cfg, backbone: nn.Module, folder: Path) -> dict | None:
    """Train and score one row and seed into ``folder``; returns the metrics (None on ranks other than 0)."""
    cfg = as_computed(cfg)
    module, batches = prepare(cfg, backbone)
    _test_images(cfg, module.model)  # bad input is reported before days of training
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def score_now(model: nn.Module, is_last: bool) -> dict[str, float]:
        return scores_of(cfg, model, next(model.parameters()).device, folder, multi_scale=is_last)

    validation = DenseValidation(cfg.output.validate_every, batches.sampler, cfg.dense.epochs, score_now)
    begin = time.perf_counter()
    trainer = train(cfg, module, batches, folder, [validation])
    seconds = time.perf_counter() - begin - validation.seconds
    if not trainer.is_global_zero:
        return None
    draw(cfg, module.model, device_of(cfg), folder)
    metrics = validation.with_best()
    metrics |= {"train_images": float(len(batches.batches)), "train_seconds": seconds}
    if torch.cuda.is_available():
        metrics["train_memory"] = float(torch.cuda.max_memory_allocated())
    return metrics | {"parameters": float(parameters_of(module.model))} | module.step_counts()


def scores_of(cfg, model: nn.Module, device: torch.device, folder: Path, multi_scale: bool = True) -> dict[str, float]:
    """Return the scores of a model on the row's test images (``scoring.score``)."""
    library = library_of(cfg.dense)
    config = config_of(library, cfg.dense, model.backbone.channels)
    return score(cfg, library, config, model, device, folder, multi_scale)


def draw(cfg, model: nn.Module, device: torch.device, folder: Path) -> None:
    """Write ``predictions.png`` into ``folder`` where the paper's configuration asks for pictures, or has no say."""
    if not cfg.output.get("pictures", True):
        return
    images = _test_images(cfg, model)
    draw_predictions(folder / "predictions.png", images, predictions(cfg, model, images, device))


def _test_images(cfg, model: nn.Module):
    library = library_of(cfg.dense)
    return open_set(library, config_of(library, cfg.dense, model.backbone.channels), cfg, "test", cache_of(cfg))


def evaluate_checkpoint(cfg, backbone: nn.Module, path: Path, folder: Path) -> dict[str, float]:
    """Return the scores of a checkpoint of a run; UserError for a damaged one and for one of another arrangement."""
    cfg, library = as_computed(cfg), library_of(cfg.dense)
    model = build_model(library, config_of(library, cfg.dense, backbone.channels), backbone)
    state, steps = read_checkpoint(path)
    load_weights(model, state, cfg.row, path)
    scores = scores_of(cfg, model, device_of(cfg), folder)
    draw(cfg, model, device_of(cfg), folder)
    return scores | {"parameters": float(parameters_of(model)), "steps_trained": float(steps)}


def parameters_of(model: nn.Module) -> int:
    """Return the number of parameters, frozen ones too, as the libraries count them."""
    return sum(parameter.numel() for parameter in model.parameters())


def seconds_of_run(cfg, backbone: nn.Module) -> float:
    """Estimate the seconds of a run from three timed steps and three scored images, every scoring included."""
    cfg = as_computed(cfg)
    module, batches = prepare(cfg, backbone)
    seconds = seconds_of_training(cfg, module, batches)
    images = _test_images(cfg, module.model)
    answers = predictions(cfg, module.model, images, device_of(cfg))
    next(answers)  # warms up
    begin = time.perf_counter()
    timed = sum(1 for _ in islice(answers, TIMED))
    image = (time.perf_counter() - begin) / max(timed, 1)
    times = 1 + len(DenseValidation(cfg.output.validate_every, batches.sampler, cfg.dense.epochs, None).due)
    scorings = times + 2 * sum(ratio**2 for ratio in cfg.dense.ratios)  # by area, plain and mirrored
    return seconds + scorings * len(images) * image / max(ranks_of(cfg.trainer), 1)
