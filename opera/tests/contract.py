"""What the contract tests need to know of OPERA."""

import functools
from pathlib import Path

import torch
from omegaconf import OmegaConf

from opera import train
from opera.hierarchy import ARRANGEMENTS
from shared.claims.protocol import Paper
from shared.testing.contract import Bad, Contract, Training
from shared.training.config import run_folder
from shared.training.fit import fit

BATCHES_AN_EPOCH = 11  # of 128 digits
SMALL = [
    "heads.dim=16",
    "heads.hidden=32",
    "heads.class_hidden=16",
    "task.epochs=2",
    "output.validate_every=1",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.strategy=auto",
    "logger=none",
]
# What makes any row tiny, on the digits.
TOY = {
    "optim.batch_size": 16,
    "optim.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.workers": 0,
    "data.manifest": "digits",
    "data.image_size": 8,
    "data.classes": 10,
    "data.train_images": None,
    "heads.dim": 8,
    "heads.hidden": 16,
    "heads.class_hidden": 8,
}


def length(steps: int) -> list[str]:
    return [f"scale.epochs={max(1, steps // BATCHES_AN_EPOCH)}", "optim.warmup_epochs=0.2"]


def prepare(cfg, folder) -> Training:
    """What a pre-training needs: weights, statistics, the momentum encoder."""
    module, data = train.prepare(cfg)
    return Training(module, data, functools.partial(fit, cfg, module, data, folder))


def checkpoints(cfg) -> list[Path]:
    return [
        train.pretraining_folder(cfg) / "last.ckpt",
        *(train.task_folder(run_folder(cfg), name, cfg.task.weights) / "last.ckpt" for name in cfg.task.sets),
    ]


def losses(module, batch, number):
    terms = module.terms(batch)
    return torch.stack([terms.total, *terms])


def after_step(module) -> None:
    module.model.update_momentum(0.9)


def toy(cfg) -> None:
    for key, value in TOY.items():
        OmegaConf.update(cfg, key, value)
    if cfg.objective.mask is not None:
        cfg.objective.mask.width, cfg.objective.mask.depth, cfg.objective.mask.heads = 8, 1, 1
    cfg.model.backbone = "vit-tiny" if cfg.model.backbone.startswith("vit") else "convnet-tiny"


CONTRACT = Contract(
    paper=Paper("opera", Path(__file__).parents[2]),
    row="digits-opera",
    small=SMALL,
    length=length,
    prepare=prepare,
    checkpoints=checkpoints,
    steps_per_epoch=BATCHES_AN_EPOCH,
    steps=2 * BATCHES_AN_EPOCH,
    copies=("model.online.", "model.momentum."),
    stops=[(0, 9), (0, 19), (1, 9)],  # the last one in the probe
    rank_cases={name: [f"objective.arrangement={name}"] for name in ARRANGEMENTS}
    # Unequal parts of a batch, and of the labels in it.
    | {"unequal": ["optim.batch_size=31"], "partly labelled": ["data.labelled=0.3"]},
    losses=losses,
    after_step=after_step,
    rank_tolerance=1e-8,
    misspelt=("digits-oper", "digits-opera"),
    unknown_keys=("optim.lrr", "data.sizes", "nothing", "objective.temp"),
    named_by=("seed", "hash"),  # rows that pre-train alike share a pre-training
    same={  # table 9 has rows in common with tables 2 and 4
        "opera-t9-ft": "opera-ft-vit-b-bs4096-pt300-ft150-top",
        "opera-t9-miou": "opera-seg-vit-b-bs4096-pt300",
    },
    differing=({"row"}, {"objective", "variant", "data", "task"}),  # task: its weights, of a row that begins untrained
    toy=toy,
    moves_at_once=False,
    unfit=["objective=moco-v3"],
    bad={
        "no labels": Bad(["data.labelled=0"], "needs labels and data.labelled=0.0 leaves none", "raise it, or choose"),
        "a part above the whole": Bad(["data.labelled=2"], "data.labelled=2.0 is no part", "set 0 to 1"),
        "batch larger than the data": Bad(["optim.batch_size=5000"], "do not fill one batch", "lower optim.batch_size"),
        "probe's batch larger than the data": Bad(
            ["task.batch_size=5000"], "do not fill one batch", "lower task.batch_size"
        ),
        "no data root": Bad([], "data root is not set", "set DATA_ROOT=<folder>", row="cifar10-opera"),
        "no epochs": Bad(["scale.epochs=0"], "scale.epochs=0 trains nothing", "give 1 or more"),
        "no epochs of the task": Bad(["task.epochs=0"], "task.epochs=0 trains nothing", "give 1 or more"),
        "unknown arrangement": Bad(["objective.arrangement=omni"], "arrangement=omni is unknown", "one-space"),
        "unknown optimiser": Bad(["optim.name=adam"], "optim.name=adam is unknown", "choose one of lars"),
        "unknown set": Bad(["task.sets=[stl10]"], "there is no image set 'stl10'", "choose one of"),
        "no temperature": Bad(["objective.temperature=0"], "temperature=0", "set it above 0"),
        "a view's part of the area": Bad(["views.scale=[0.5,2]"], "views.scale", "two parts of the area"),
        "a task without its recipe": Bad(["task=dense"], "task.kind=dense and dense", "set task=dense and dense="),
        "bfloat16 for boxes": Bad(
            ["dense.optim.precision=bf16-mixed"],
            "bfloat16 loses pixels of boxes",
            "choose one of 32-true",
            row="opera-shapes",
        ),
        "fewer classes than there are": Bad(["data.classes=5"], "has 10 classes and", "set data.classes=10"),
    },
)
