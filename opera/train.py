"""One run of OPERA or of a baseline: pre-training, then what its features are worth on one set or several.

    make reproduce-opera ROWS=cifar10-supervised,cifar10-moco-v3,cifar10-opera SCALE=lite DATA_ROOT=...

This is a Hydra application, ``python -m opera.train``; ``seconds_of_run`` estimates what a run costs. A pre-training
has a folder of its own, named by what it depends on, so that rows which differ in what follows share it.
"""

import copy
import hashlib
import time
from collections import Counter
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from opera import dense
from opera.backbones import build_backbone
from opera.config import CONFIGS, OPERAConfig
from opera.data import pretraining_data
from opera.hierarchy import Hierarchy, conflict
from opera.knn import knn_scores
from opera.masked import MASKED_ARRANGEMENTS, MaskedHierarchy
from opera.moco_checkpoints import load_moco_v3
from opera.module import PretrainingModule
from opera.sets import load_classification_set
from opera.tuning import KINDS, TuningModule, logit_scores, outputs, scored_batches, tuning_data
from opera.views import Views
from shared.dense.run import require_sets
from shared.dense.run import run as run_dense
from shared.dense.run import seconds_of_run as seconds_of_dense
from shared.errors import UserError
from shared.files import folder_lock
from shared.records import config_sha256
from shared.training.application import command, run_job
from shared.training.checks import autocast_context, device_of, process_rank
from shared.training.config import root_of
from shared.training.fit import TrainingData, fit, seconds_of_training
from shared.training.ranks import rank, with_global_batchnorm, world_size
from shared.training.validation import Validation

CONFLICT_BATCHES, CONFLICT_IMAGES = 8, 256  # over which the conflict is averaged; at most, of a batch
UNTRAINED = "untrained"  # task.weights of a network as it is initialised
STEP_COUNTS = ("steps_trained", "skipped_steps")
NEIGHBOURS = 20  # where a task names none and a checkpoint is scored
PRETRAINING = ("seed", "model", "heads", "objective", "data", "views", "optim")  # what it depends on, and epochs


def build_hierarchy(cfg: OPERAConfig) -> Hierarchy:
    """Return the network of a pre-training, untrained; UserError for what cannot be built."""
    torch.manual_seed(cfg.seed)
    backbone = build_backbone(cfg.model.backbone, cfg.data.image_size)
    objective, heads = cfg.objective, OmegaConf.to_container(cfg.heads)
    arguments = (backbone, cfg.data.classes, heads, objective.arrangement, objective.temperature)
    interpretation = {"loss_weights": objective.loss_weights, "denominator": objective.denominator}
    if objective.arrangement in MASKED_ARRANGEMENTS:
        if objective.mask is None:
            raise UserError(
                f"objective.arrangement={objective.arrangement} needs objective.mask: say objective=mae or opera-mae"
            )
        hierarchy = MaskedHierarchy(*arguments, OmegaConf.to_container(objective.mask), **interpretation)
    else:
        hierarchy = Hierarchy(*arguments, **interpretation)
    return with_global_batchnorm(hierarchy)


def check(cfg: OPERAConfig) -> None:
    """Raise UserError for a task that is unknown, or does not go with ``dense``."""
    dense.check(cfg)
    if cfg.dense is None and (cfg.task.kind not in KINDS or not cfg.task.sets):
        raise UserError(
            f"task.kind={cfg.task.kind}, task.sets={cfg.task.sets}: choose one of {', '.join(KINDS)}, and a set or more"
        )


def prepare(cfg: OPERAConfig) -> tuple[PretrainingModule, TrainingData]:
    """Return all that a pre-training needs, as a function of the config alone; raises UserError for bad input."""
    data = pretraining_data(cfg)
    return PretrainingModule(build_hierarchy(cfg), Views(cfg.views), cfg, data.sampler.steps), data


def pretraining_folder(cfg: OPERAConfig) -> Path:
    """Return the folder of a pre-training: the same for all configs that pre-train alike."""
    tree = OmegaConf.to_container(cfg, resolve=True)
    kept = {name: tree[name] for name in PRETRAINING} | {"epochs": cfg.scale.epochs}
    if cfg.objective.arrangement == "instance":
        kept["weight"] = "2 T"  # it was T once, by the same configuration
    digest = config_sha256(kept, {"objective.mask": None})  # a key that only masked spaces have
    return root_of(cfg) / cfg.paths.runs / "pretraining" / f"seed{cfg.seed}-{digest[:12]}"


def pretrained(cfg: OPERAConfig) -> tuple[PretrainingModule, TrainingData, float, bool]:
    """Return the module after its pre-training, its data, the seconds that it took now and whether this is rank 0.

    Raises UserError where another process is at the same pre-training.
    """
    module, data = prepare(cfg)
    folder = pretraining_folder(cfg)
    if process_rank(cfg.trainer) > 0:
        return *_fitted(cfg, module, data, folder), False
    with folder_lock(folder) as is_held:
        if not is_held:
            raise UserError(f"{folder.name} is being pre-trained by another process: type the command again after that")
        return *_fitted(cfg, module, data, folder), True


def _fitted(
    cfg: OPERAConfig, module: PretrainingModule, data: TrainingData, folder: Path
) -> tuple[PretrainingModule, TrainingData, float]:
    begin = time.perf_counter()
    fit(cfg, module, data, folder)
    return module, data, time.perf_counter() - begin


def run(cfg: OPERAConfig, folder: Path) -> dict | None:
    """Pre-train and score one row and seed; returns the metrics (None on ranks other than 0).

    With ``task.weights`` an official file, or an untrained network, replaces the pre-training.
    """
    for name in cfg.task.sets:
        tuning_data(cfg, name)  # bad input is reported before days of pre-training
    if cfg.dense is not None:
        require_sets(cfg)
    module = None
    if cfg.task.weights is not None:
        backbone, first = initial_backbone(cfg), process_rank(cfg.trainer) == 0
        metrics, counts = {"weights": _weights_name(cfg.task.weights)}, Counter()
    else:
        begun = (pretraining_folder(cfg) / "last.ckpt").exists()
        module, data, seconds, first = pretrained(cfg)
        backbone = module.model.online.backbone
        metrics = {"resumed": 1.0} if begun else {"pretrain_seconds": seconds}
        metrics["train_images"], counts = float(len(data.batches)), Counter(module.step_counts())
    metrics["parameters"] = float(sum(p.numel() for p in backbone.parameters()))
    if cfg.dense is not None:
        counts = Counter(module.step_counts() if module is not None else {})
        scores = run_dense(cfg, dense.backbone_of(cfg, backbone), dense.folder_of(folder))
        return scores and metrics | scores | {name: scores[name] + counts[name] for name in STEP_COUNTS}
    for number, name in enumerate(cfg.task.sets):
        scores = evaluate_on(cfg, backbone, name, task_folder(folder, name, cfg.task.weights))
        counts.update({key: scores.pop(key) for key in STEP_COUNTS})
        suffix = "" if number == 0 else f"_{name}"
        metrics |= {key + suffix: value for key, value in scores.items()}
    metrics |= counts  # of all trainings together
    if module is not None and module.model.predictor is not None and module.model.class_head is not None:
        metrics["gradient_cosine"] = measured_conflict(cfg, module, data)
    return metrics if first else None


def _weights_name(weights: str) -> str:
    """Return what identifies ``task.weights``, whatever its path: the sha256 of the file, or "untrained"."""
    if weights == UNTRAINED:
        return UNTRAINED
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def task_folder(folder: Path, name: str, weights: str | None) -> Path:
    """Return the folder of a set's classifier: another one for another file, so that no run continues from it."""
    if weights in (None, UNTRAINED):
        return folder / name
    return folder / _weights_name(weights)[:12] / name


def initial_backbone(cfg: OPERAConfig) -> nn.Module:
    """Return the backbone that replaces a pre-trained one: as initialised, or of an official file."""
    torch.manual_seed(cfg.seed)
    backbone = build_backbone(cfg.model.backbone, cfg.data.image_size)
    if cfg.task.weights != UNTRAINED:
        load_moco_v3(backbone, cfg.task.weights)
    return with_global_batchnorm(backbone)


def measured_conflict(cfg: OPERAConfig, module: PretrainingModule, data: TrainingData) -> float:
    """Return the mean over batches of the cosine between the two objectives' gradients (``hierarchy.conflict``)."""
    device = device_of(cfg)
    model = copy.deepcopy(module.model).to(device).train()
    cosines = []
    torch.manual_seed(cfg.seed)  # masked spaces draw what they hide
    for where in conflict_batches(data, cfg.scale.epochs):
        batch = {name: value.to(device) for name, value in data.batches[where].items()}
        with autocast_context(cfg, device):
            cosines.append(conflict(model, *module.both_views(batch), batch["labels"]))
    return sum(cosines) / len(cosines)


def conflict_batches(data: TrainingData, epoch: int) -> list[tuple[int, np.ndarray]]:
    """Return (epoch, samples of this rank) of the batches that an epoch begins with, cut to what fits."""
    order, size = data.sampler.order(epoch), data.sampler.batch_size
    starts = range(0, len(order) - size + 1, size)[:CONFLICT_BATCHES]
    cut = min(size, CONFLICT_IMAGES)
    return [(epoch, order[start : start + cut][rank() :: world_size()]) for start in starts]


def evaluate_on(cfg: OPERAConfig, backbone: nn.Module, name: str, folder: Path) -> dict[str, float]:
    """Return top1, top5 and, for a probe, top1_knn of a backbone on a data set, training what the task says.

    Beside them ``step_counts`` of that training.
    """
    data, test = tuning_data(cfg, name)
    backbone, scores = copy.deepcopy(backbone), {}
    if cfg.task.neighbours is not None:
        scores["top1_knn"] = neighbour_scores(cfg, backbone, name)
    torch.manual_seed(cfg.seed)
    tuned = with_drop_path(cfg, backbone)
    module = TuningModule(tuned, len(test.classes), cfg, data.sampler.steps)
    validation = Validation(cfg, scored_batches(cfg, test), data.sampler)
    fit(cfg, module, data, folder, [validation])
    scores |= logit_scores(*outputs(cfg, module.model, test))
    scores = scores | validation.with_best({"": scores})
    return scores | {"n_test": float(len(test))} | module.step_counts()


def neighbour_scores(cfg: OPERAConfig, backbone: nn.Module, name: str) -> float:
    """Return the top-1 of k-NN on a set's frozen features, a fraction (``knn.knn_scores``)."""
    data, test = tuning_data(cfg, name)
    train = load_classification_set(name, "train", cfg.paths.data_root)
    features = outputs(cfg, backbone, train, data.batches.chosen)
    of_test, labels = outputs(cfg, backbone, test)
    neighbours = cfg.task.neighbours or NEIGHBOURS
    votes = knn_scores(*features, of_test, len(test.classes), neighbours, cfg.task.neighbour_temperature)
    return logit_scores(votes, labels)["top1"]


def with_drop_path(cfg: OPERAConfig, backbone: nn.Module) -> nn.Module:
    """Return a pre-trained backbone with the task's stochastic depth."""
    if not cfg.task.drop_path:
        return backbone
    tuned = with_global_batchnorm(build_backbone(cfg.model.backbone, cfg.data.image_size, cfg.task.drop_path))
    tuned.load_state_dict(backbone.state_dict())
    return tuned


def seconds_of_run(cfg: OPERAConfig) -> float:
    """Estimate the seconds of a whole run from three timed steps of the pre-training and of every task."""
    if cfg.task.weights is not None:
        backbone, total = initial_backbone(cfg), 0.0
    else:
        module, data = prepare(cfg)
        backbone, total = module.model.online.backbone, seconds_of_training(cfg, module, data)
    if cfg.dense is not None:
        return total + seconds_of_dense(cfg, dense.backbone_of(cfg, copy.deepcopy(backbone)))
    for name in cfg.task.sets:
        data, test = tuning_data(cfg, name)
        tuned = with_drop_path(cfg, copy.deepcopy(backbone))
        total += seconds_of_training(cfg, TuningModule(tuned, len(test.classes), cfg, data.sampler.steps), data)
    return total


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: OPERAConfig) -> float | None:
    return run_job(cfg, run, check)


if __name__ == "__main__":
    # Under its own name: a launcher that sends jobs to processes would otherwise copy all of this module to them.
    from opera.train import main

    main()
