"""One run of IDML or of a baseline: images -> training -> scores and checkpoints.

    make reproduce-idml ROWS=cub50-pa,cub50-pa-mixup,cub50-idml-pa SCALE=lite DATA_ROOT=...

This is a Hydra application, ``python -m idml.train``; ``seconds_of_run`` estimates what a run costs.
"""

import time
from pathlib import Path

import hydra
import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from idml import classification
from idml.config import CONFIGS, IDMLConfig
from idml.data import evaluation_batches, training_data, training_images
from idml.figures import draw_uncertainty
from idml.losses import build_loss
from idml.model import build_embedding_network
from idml.module import OPTIMIZERS, RetrievalModule, parameters_of
from idml.scoring import chance_level, embed, recall_at_1, scores
from idml.selection import CHOICES, EpochSelection, require_selection
from idml.sets import load_retrieval_set
from idml.uncertainty import ambiguous_uncertainties, uncertainty_scores
from shared.data.images import ImageSet
from shared.errors import UserError
from shared.training.application import command, run_job
from shared.training.checkpoints import load_weights, read_checkpoint
from shared.training.checks import device_of, synchronise
from shared.training.fit import TrainingData, seconds_of_training
from shared.training.fit import fit as train


def check(cfg: IDMLConfig) -> None:
    """Raise UserError for an optimiser, and for a way to choose an epoch, that this task does not have."""
    known = ["sgd"] if cfg.data.task == "classification" else list(OPTIMIZERS)
    if cfg.optim.optimizer not in known:
        raise UserError(f"optim.optimizer={cfg.optim.optimizer}: for {cfg.data.task} choose {' or '.join(known)}")
    if cfg.optim.clip_value is not None and cfg.optim.clip_norm is not None:
        raise UserError("optim.clip_value and optim.clip_norm are both set: set one of them to null")
    if cfg.data.task == "classification":
        classification.require_selection(cfg)
    else:
        require_selection(cfg)


def prepare(cfg: IDMLConfig) -> tuple[RetrievalModule, TrainingData, dict[str, ImageSet]]:
    """Return all that a run trains and chooses an epoch with, as a function of the config alone.

    Raises UserError for bad input.
    """
    images, held_out = training_images(cfg)
    sets = {"best-test-epoch": load_retrieval_set(cfg.data.manifest, "test", cfg.paths.data_root)}
    if held_out is not None:
        sets["held-out"] = held_out
    data = training_data(cfg, images)
    torch.manual_seed(cfg.seed)
    network = build_embedding_network(cfg)
    # Again, so that a row's proxies are those of its baseline, whose network has drawn less.
    torch.manual_seed(cfg.seed)
    loss, metric = (OmegaConf.to_container(part) for part in (cfg.loss, cfg.metric))
    criterion = build_loss(loss, metric, len(images.classes), cfg.model.semantic_dim)
    steps_per_epoch = data.sampler.steps // cfg.scale.epochs
    return RetrievalModule(network, criterion, cfg, steps_per_epoch), data, sets


def fit(cfg: IDMLConfig, module: pl.LightningModule, data: TrainingData, folder: Path, callbacks=()) -> pl.Trainer:
    """Train for the steps of the config, continuing from ``folder/last.ckpt`` where there is one."""
    clipping = {"gradient_clip_val": cfg.optim.clip_value, "gradient_clip_algorithm": "value"}
    if cfg.optim.clip_norm is not None:
        clipping = {"gradient_clip_val": cfg.optim.clip_norm, "gradient_clip_algorithm": "norm"}
    return train(cfg, module, data, folder, callbacks, **clipping)


def run(cfg: IDMLConfig, folder: Path) -> dict | None:
    """Train and score one row and seed into ``folder``; returns the metrics (None on ranks other than 0)."""
    if cfg.data.task == "classification":
        return classification.run(cfg, folder, fit)
    module, data, sets = prepare(cfg)
    test = sets["best-test-epoch"]
    batches = evaluation_batches(cfg, test)
    untrained = recall_at_1(embed(module.model, batches, device_of(cfg), cfg.trainer.workers))
    module.train()
    selection = EpochSelection(cfg, folder, sets, module.steps_per_epoch)
    begin = time.perf_counter()
    trainer = fit(cfg, module, data, folder, [selection])
    seconds = time.perf_counter() - begin
    if not trainer.is_global_zero:
        return None
    metrics = score_choices(cfg, module, selection, test, trainer.strategy.root_device, folder)
    metrics["recall_at_1_untrained"] = untrained
    metrics["recall_at_1_chance"] = chance_level(torch.from_numpy(test.labels))
    metrics["train_images"] = float(len(data.batches))
    metrics["train_seconds"] = seconds
    metrics["parameters"] = float(parameters_of(module.model))
    metrics |= module.step_counts()
    return metrics


def score_choices(
    cfg: IDMLConfig,
    module: RetrievalModule,
    selection: EpochSelection,
    test: ImageSet,
    device: torch.device,
    folder: Path,
) -> dict[str, float]:
    """Return the scores of every choice of an epoch under its name, those of ``cfg.selection`` under none as well."""
    metrics, batches = {}, evaluation_batches(cfg, test)
    for choice in ["last-epoch", *selection.sets]:
        state, _ = read_checkpoint(selection.path(choice))
        load_weights(module.model, state, cfg.row, selection.path(choice))
        embedded = embed(module.model, batches, device, cfg.trainer.workers)
        of_choice = scores(embedded, cfg.evaluation)
        metrics |= {f"{name}_{CHOICES[choice]}": value for name, value in of_choice.items()}
        if choice != "last-epoch":
            metrics[f"epoch_{CHOICES[choice]}"] = float(selection.best_epoch(choice))
        if choice == "held-out":
            metrics["recall_at_1_of_held_out"] = max(selection.curves[choice])
        if choice == cfg.selection:
            metrics |= of_choice | {"n_test": float(len(test))}
            if cfg.model.uncertainty_dim:
                changed = ambiguous_uncertainties(module.model, batches, device, cfg.trainer.workers)
                metrics |= uncertainty_scores(embedded, changed)
                if cfg.output.pictures:
                    draw_uncertainty(folder, test, embedded.uncertainty, changed)
    return metrics


def seconds_of_run(cfg: IDMLConfig) -> float:
    """Estimate the seconds of a whole run from three timed steps and the embedding of one batch.

    Of a batch that several devices share, one device's part is loaded and timed.
    """
    if cfg.data.task == "classification":
        return classification.seconds_of_run(cfg)
    module, data, sets = prepare(cfg)
    seconds, device = seconds_of_training(cfg, module, data), device_of(cfg)
    batch = next(iter(data.train_dataloader()))["images"].to(device)
    module.eval()
    begin = time.perf_counter()
    with torch.no_grad():
        module.model(batch)
    synchronise(device)
    seconds_per_image = (time.perf_counter() - begin) / len(batch)
    scored = sum(map(len, sets.values())) * (cfg.scale.epochs + len(sets) + 1)
    return seconds + scored * seconds_per_image


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: IDMLConfig) -> float | None:
    return run_job(cfg, run, check)


if __name__ == "__main__":
    # Under its own name: a launcher that sends jobs to processes would otherwise copy all of this module to them.
    from idml.train import main

    main()
