"""Score a checkpoint of OPERA, of a baseline or of MoCo-v3's authors, without training.

    make evaluate-opera ROW=digits-opera SEED=0                                    # its pre-training
    make evaluate-opera ROW=digits-opera SEED=0 CKPT=runs/opera/demo/digits-opera/seed0-.../digits/last.ckpt
    make evaluate-opera ROW=lin-vit-s-moco-v3-300 CKPT=vit-s-300ep.pth.tar DATA_ROOT=/data

A pre-training is scored by k-NN on every set of ``task.sets``, a tuned classifier by its own answers on the set that it
was tuned on. The images come from the config, as in training. The weights are read with ``weights_only=True``.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import hydra
from torch import Tensor, nn

from opera import dense
from opera.backbones import build_backbone
from opera.config import CONFIGS, OPERAConfig
from opera.moco_checkpoints import is_official, linear_classifier, load_moco_v3
from opera.sets import load_classification_set
from opera.train import UNTRAINED, build_hierarchy, check, neighbour_scores, pretraining_folder, task_folder
from opera.tuning import Classifier, logit_scores, outputs
from shared.data.images import ImageSet
from shared.dense.run import evaluate_checkpoint as evaluate_dense
from shared.errors import UserError
from shared.training.application import command, run_evaluation
from shared.training.checkpoints import load_weights, read_checkpoint
from shared.training.config import run_folder


def checkpoint_of(cfg: OPERAConfig) -> Path:
    """Return where a row and seed leave their checkpoint: of the pre-training, or of the first task without one.

    Raises UserError for a file of ``task.weights`` that is missing.
    """
    if cfg.dense is not None:
        return dense.folder_of(run_folder(cfg)) / "last.ckpt"
    if cfg.task.weights is None:
        return pretraining_folder(cfg) / "last.ckpt"
    if cfg.task.weights != UNTRAINED and not Path(cfg.task.weights).is_file():
        raise UserError(f"{cfg.task.weights} is missing: give an official file of MoCo-v3 as task.weights")
    return task_folder(run_folder(cfg), cfg.task.sets[0], cfg.task.weights) / "last.ckpt"


def suffixed(scores: dict[str, float], name: str, sets: Sequence[str]) -> dict[str, float]:
    """Return a set's scores as a run names them: those of the first of all sets bare, others ``_<set>`` behind."""
    suffix = "" if name == sets[0] else f"_{name}"
    return {key + suffix: value for key, value in scores.items()}


def score_neighbours(cfg: OPERAConfig, backbone: nn.Module) -> dict[str, float]:
    """Return top1_knn and n_test of a backbone on every set."""
    metrics: dict[str, float] = {}
    for name in cfg.task.sets:
        tested = float(len(load_classification_set(name, "test", cfg.paths.data_root)))
        scores = {"top1_knn": neighbour_scores(cfg, backbone, name), "n_test": tested}
        metrics |= suffixed(scores, name, cfg.task.sets)
    return metrics


def tuned_on(cfg: OPERAConfig, path: Path, classes: int) -> tuple[str, ImageSet]:
    """Return name and test images of the set that a classifier was tuned on.

    A run leaves it in a folder of the set's name; elsewhere the number of classes tells it, where only one set of
    ``task.sets`` has so many. Raises UserError where nothing tells it.
    """
    named = [name for name in cfg.task.sets if name == path.absolute().parent.name]
    tests = {name: load_classification_set(name, "test", cfg.paths.data_root) for name in named or cfg.task.sets}
    fitting = [name for name, test in tests.items() if len(test.classes) == classes]
    if len(fitting) != 1:
        sizes = ", ".join(f"{name} {len(test.classes)}" for name, test in tests.items())
        raise UserError(
            f"{path} tells {classes} classes apart, and the sets of row {cfg.row} have: {sizes}; say which one it was "
            "tuned on with task.sets=[NAME]"
        )
    return fitting[0], tests[fitting[0]]


def score_head(cfg: OPERAConfig, backbone: nn.Module, path: Path) -> dict[str, float]:
    """Return top1, top5 and n_test of an official file's linear classifier, on the set that it can be of.

    Nothing where the file has none, and where not exactly one of ``task.sets`` has as many classes.
    """
    head = linear_classifier(path)
    if head is None:
        return {}
    tests = {name: load_classification_set(name, "test", cfg.paths.data_root) for name in cfg.task.sets}
    fitting = [name for name, test in tests.items() if len(test.classes) == len(head["bias"])]
    if len(fitting) != 1:
        return {}
    classifier = Classifier(copy.deepcopy(backbone), len(head["bias"]))
    classifier.head.load_state_dict(head)
    test = tests[fitting[0]]
    scores = logit_scores(*outputs(cfg, classifier, test))
    return suffixed(scores | {"n_test": float(len(test))}, fitting[0], cfg.task.sets)


def score_classifier(cfg: OPERAConfig, state: dict[str, Tensor], path: Path, backbone: nn.Module) -> dict[str, float]:
    """Return top1, top5 and n_test of a tuned classifier on its set; ``backbone`` gets its weights."""
    classifier = Classifier(backbone, len(state["head.weight"]))
    load_weights(classifier, state, cfg.row, path)
    name, test = tuned_on(cfg, path, len(state["head.weight"]))
    scores = logit_scores(*outputs(cfg, classifier, test))
    return suffixed(scores | {"n_test": float(len(test))}, name, cfg.task.sets)


def evaluate_checkpoint(cfg: OPERAConfig, path: Path, folder: Path) -> dict:
    """Return the scores of a checkpoint by the names of a run; nothing is drawn into ``folder``.

    A pre-training's, and a file's of MoCo-v3's authors: top1_knn and n_test of every set, with top1 and top5 of the
    latter's linear classifier where it has one. A tuned classifier's: top1, top5 and n_test of its set. All:
    parameters of the backbone; those of runs steps_trained. Raises UserError for a missing or damaged checkpoint,
    for one of another arrangement or backbone, and where the set cannot be told from it.
    """
    path = Path(path)
    backbone = build_backbone(cfg.model.backbone, cfg.data.image_size)
    if cfg.dense is not None:
        return evaluate_dense(cfg, dense.backbone_of(cfg, backbone), path, folder)
    parameters = {"parameters": float(sum(parameter.numel() for parameter in backbone.parameters()))}
    if is_official(path):
        load_moco_v3(backbone, path)
        return score_head(cfg, backbone, path) | score_neighbours(cfg, backbone) | parameters
    state, steps = read_checkpoint(path)
    trained = parameters | {"steps_trained": float(steps)}
    if any(name.startswith("online.backbone.") for name in state):
        hierarchy = build_hierarchy(cfg)
        load_weights(hierarchy, state, cfg.row, path)
        return score_neighbours(cfg, hierarchy.online.backbone) | trained
    if "head.weight" in state:
        return score_classifier(cfg, state, path, backbone) | trained
    raise UserError(
        f"{path} holds neither a pre-training nor a tuned classifier of OPERA: give a last.ckpt of row {cfg.row}"
    )


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: OPERAConfig) -> None:
    run_evaluation(cfg, evaluate_checkpoint, check, default_checkpoint=checkpoint_of)


if __name__ == "__main__":
    main()
