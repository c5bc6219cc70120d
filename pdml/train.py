"""One run of PDML or of a baseline: scene -> patches -> training -> scores, maps and checkpoint.

    make reproduce-pdml ROWS=jasper-disjoint-ssrn-pdml SCALE=lite DATA_ROOT=...

This is a Hydra application, ``python -m pdml.train``; ``seconds_of_run`` estimates what a run costs.
"""

import logging
import os
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from scipy.special import entr
from scipy.stats import spearmanr
from tqdm import tqdm

from pdml.config import CONFIGS, OutputConfig, PDMLConfig
from pdml.inference import Readout, ScenePrediction, predict_scene
from pdml.maps import draw_maps
from pdml.model import PatchModel, build_model
from pdml.module import PatchBatches, PDMLModule
from pdml.scenes import Scene, Split, load_scene
from pdml.scores import classification_scores
from pdml.svm import predict_svm
from shared.data.sampler import KeyedBatchSampler
from shared.training.application import command, run_job
from shared.training.fit import TrainingData, fit, seconds_of_training

log = logging.getLogger(__name__)


def prepare(cfg: PDMLConfig) -> tuple[Scene, Split, PDMLModule, TrainingData]:
    """Return all that a run trains with, as a function of the config alone; raises UserError for bad input."""
    scene, split = load_scene(cfg.data, cfg.seed, cfg.patch_size, cfg.paths.data_root)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, scene.cube.shape[2], len(scene.class_names))
    model.spectral.fit(scene.cube[split.train])
    batches = PatchBatches(scene, split, cfg.patch_size, cfg.seed)
    sampler = KeyedBatchSampler(len(batches), cfg.optim.batch_size, cfg.seed, cfg.scale.steps)
    data = TrainingData(batches, sampler, mixes=False, workers=cfg.trainer.workers)
    return scene, split, PDMLModule(model, cfg.optim, cfg.scale.steps), data


def readout_scores(scene: Scene, split: Split, readout: Readout) -> dict:
    """Return oa, aa, kappa and per_class of a read-out, and how it follows the mixing where that is known.

    ``rho`` is Spearman's correlation of a pixel's uncertainty with the entropy of its true abundances,
    ``rho_entropy`` that of the entropy of its class probabilities; for the baselines they are the same.
    """
    pixels = split.scored(scene.labels)
    scores = classification_scores(
        scene.labels[pixels].astype(np.int64) - 1,
        readout.prediction[pixels].astype(np.int64),
        len(scene.class_names),
        split.classes,
    )
    if scene.abundances is not None:
        mixing = entr(scene.abundances[pixels]).sum(1)
        scores["rho"] = float(spearmanr(readout.uncertainty[pixels], mixing).statistic)
        if readout.probabilities is not None:
            entropy = entr(readout.probabilities[pixels]).sum(1)
            scores["rho_entropy"] = float(spearmanr(entropy, mixing).statistic)
    return scores


def evaluate(
    scene: Scene, split: Split, model: PatchModel, readout: str, output: OutputConfig
) -> tuple[dict, ScenePrediction]:
    """Return the metrics of both read-outs, those of ``readout`` without suffix, and the maps."""
    begin = time.perf_counter()
    wanted = None if output.region == "scene" else split.test
    prediction = predict_scene(
        model,
        scene.cube,
        output.batch_size,
        wanted=wanted,
        probabilities=True,
        fused=readout == "fused",
        progress=tqdm if os.isatty(2) else None,
    )
    seconds = time.perf_counter() - begin
    metrics = scene_metrics(readout, scene, split, prediction) | {"inference_seconds": seconds}
    return metrics, prediction


def scene_metrics(readout: str, scene: Scene, split: Split, prediction: ScenePrediction) -> dict:
    """Return the metrics of both read-outs, those of ``readout`` without suffix, and what was scored."""
    metrics: dict = {}
    for name in ("centre", "fused"):
        if (maps := getattr(prediction, name)) is not None:
            scores = readout_scores(scene, split, maps)
            metrics |= {f"{key}_{name}": value for key, value in scores.items()}
            metrics |= scores if name == readout else {}
    names = np.array(scene.class_names)
    metrics["classes_scored"] = f"{int(split.classes.sum())} of {len(names)}"
    metrics["classes_left_out"] = ", ".join(names[~split.classes]) or "none"
    metrics["train_pixels"] = float(split.train.sum())
    metrics["n_test"] = float(split.scored(scene.labels).sum())
    return metrics


def run(cfg: PDMLConfig, folder: Path) -> dict | None:
    """Train, score and draw one row and seed into ``folder``; returns the metrics (None on ranks other than 0)."""
    if cfg.method.name == "svm":
        return run_svm(cfg, folder)
    scene, split, module, data = prepare(cfg)
    begin = time.perf_counter()
    trainer = fit(cfg, module, data, folder)
    seconds = time.perf_counter() - begin
    if not trainer.is_global_zero:
        return None
    model = module.model.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    metrics, prediction = evaluate(scene, split, model, cfg.method.readout, cfg.output)
    metrics["train_seconds"] = seconds
    metrics["parameters"] = float(sum(p.numel() for p in module.model.parameters()))
    metrics |= module.step_counts()
    if cfg.output.maps:
        draw_maps(folder, scene, split, prediction)
    return metrics


def run_svm(cfg: PDMLConfig, folder: Path) -> dict:
    """Fit and score the spectral baseline of ``cfg.method``, which sees single pixels and no patch."""
    scene, split = load_scene(cfg.data, cfg.seed, cfg.patch_size, cfg.paths.data_root)
    begin = time.perf_counter()
    prediction = predict_svm(scene, split, cfg.method.model.C, cfg.method.model.input, cfg.components)
    metrics = scene_metrics(cfg.method.readout, scene, split, prediction)
    metrics["train_seconds"] = time.perf_counter() - begin
    if cfg.output.maps:
        draw_maps(folder, scene, split, prediction)
    return metrics


def seconds_of_run(cfg: PDMLConfig) -> float:
    """Estimate the seconds of a whole run from three timed steps and one timed batch of inference."""
    if cfg.method.name == "svm":
        return 2.0  # fitted once, in about that time
    scene, split, module, data = prepare(cfg)
    seconds = seconds_of_training(cfg, module, data)
    begin = time.perf_counter()
    few = np.zeros(split.test.shape, bool)
    few[0, :16] = True
    predict_scene(module.model, scene.cube, cfg.output.batch_size, wanted=few, fused=False)
    pixels = few.size if cfg.output.region == "scene" else int(split.test.sum())
    return seconds + pixels / 16 * (time.perf_counter() - begin)


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: PDMLConfig) -> float | None:
    return run_job(cfg, run)


if __name__ == "__main__":
    # Under its own name: a launcher that sends jobs to processes would otherwise copy all of this module to them.
    from pdml.train import main

    main()
