"""What the contract tests need to know of IDML."""

from pathlib import Path

from omegaconf import OmegaConf

from idml import classification, train
from idml.losses import BUILDERS
from idml.selection import EpochSelection
from shared.claims.protocol import Paper
from shared.testing.contract import Bad, Contract, Training

SMALL = [
    "model.semantic_dim=8",
    "optim.batch_size=32",
    "evaluation.kmeans_seeds=1",
    "output.pictures=false",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.strategy=auto",
    "logger=none",
]
# Two of five classes are held out: 542 images of three classes, 17 batches of 32 in groups of 4. Of all five classes
# 28 batches make an epoch.
DRAWN = ["loss=margin", "data.per_class=4", "data.held_out=0.4", "selection=held-out"]
DRAWN_BATCHES = 17
PLAIN = ["metric=plain", "objective=plain"]
# What makes any row tiny, on the digits.
TOY = {
    "optim.batch_size": 20,  # of four and of five images a class
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.workers": 0,
    "data.manifest": "digits",
    "data.image_size": 8,
    "model.backbone": "convnet-tiny",
    "model.pretrained": False,
}
RETRIEVAL = {"data.held_out": 0.0, "selection": "last-epoch"}
CLASSIFICATION = {"data.classes": 10, "data.train_images": None}
# The released loss gives the head of the uncertainty no gradient beyond rounding.
DEAD = {"uncertainty.weight", "uncertainty.bias"}


def length(steps: int) -> list[str]:
    return [f"scale.epochs={max(1, steps // DRAWN_BATCHES)}"]


def prepare(cfg, folder) -> Training:
    """Mixtures and the drawing sampler have state, and so has the choice of an epoch: its curves are compared."""
    if cfg.data.task == "classification":
        module, data, _ = classification.prepare(cfg)
        return Training(module, data, lambda callbacks: train.fit(cfg, module, data, folder, callbacks))
    module, data, sets = train.prepare(cfg)
    selection = EpochSelection(cfg, folder, sets, module.steps_per_epoch)

    def fit(callbacks):
        return train.fit(cfg, module, data, folder, [selection, *callbacks])

    return Training(module, data, fit, state=lambda: selection.curves)


def losses(module, batch, number):
    if hasattr(module.metric_loss.miner, "seed_step"):
        module.metric_loss.miner.seed_step(number)
    return module.loss(batch, number)[None]


def toy(cfg) -> None:
    of_task = CLASSIFICATION if cfg.data.task == "classification" else RETRIEVAL
    for key, value in (TOY | of_task).items():
        OmegaConf.update(cfg, key, value)


def dead(cfg, network) -> tuple[set[str], set[str]]:
    if cfg.row.startswith("choice-raw"):
        # Unscaled, the uncertainty of a fresh network brings every pair to distance 0: nothing pulls any more.
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        return trained, trained
    return set(), DEAD if cfg.metric.name == "released" else set()


CONTRACT = Contract(
    paper=Paper("idml", Path(__file__).parents[2]),
    row="digits-idml-pa",
    small=SMALL,
    length=length,
    prepare=prepare,
    random=DRAWN,
    steps_per_epoch=DRAWN_BATCHES,
    steps=2 * DRAWN_BATCHES,
    stops=[(0, 9), (0, 19), (0, 29)],
    rank_cases={name: ["data.per_class=4", f"loss={name}"] for name in BUILDERS}
    | {
        "unequal": [*PLAIN, "optim.batch_size=31"],
        "pairs-on-two-ranks": ["optim.batch_size=30"],
        "unequal-pairs": ["optim.batch_size=31"],
        "released": ["metric=released"],
    },
    losses=losses,
    rate=1e-3,
    misspelt=("cub50-idml-pb", "cub50-idml-pa"),
    unknown_keys=("optim.lrr", "data.sizes", "nothing", "objective.mixup"),
    same={"idml-pa-cub-r-4": "idml-pa-cub", "idml-pa-cars-r-4": "idml-pa-cars196"},  # another metric of the same run
    differing=({"row"}, {"metric", "objective", "model", "variant", "evaluation"}),  # test_configs.py says which
    toy=toy,
    dead=dead,
    unfit=["model.semantic_dim=16"],
    scores=("recall_at_1", "nmi"),
    draw=["output.pictures=true"],
    pictures=("uncertainty.png",),
    bad={
        "no weights": Bad(
            ["data.manifest=digits"], "starts from ImageNet's weights", "paths.weights=<file>", row="idml-pa-cub"
        ),
        "no data root": Bad([], "data root is not set", "set DATA_ROOT=<folder>", row="cub50-idml-pa"),
        "unknown scaling": Bad(["metric.scaling=log"], "metric.scaling=log", "choose the scaling from raw"),
        "unknown combination": Bad(["metric.combination=mean"], "metric.combination=mean", "the combination from sum"),
        "tau of zero": Bad(["metric.tau=0"], "metric.tau=0", "set tau above 0"),
        "unknown selection": Bad(["selection=best"], "selection=best is unknown", "choose one of last-epoch"),
        "nothing held out": Bad(["selection=held-out"], "needs training classes that do not train", "data.held_out"),
        "too much held out": Bad(["data.held_out=0.9"], "data.held_out=0.9 of 5 classes", "set 0, or a part"),
        "no epochs": Bad(["scale.epochs=0"], "scale.epochs=0 trains nothing", "give 1 or more"),
        "batch larger than the data": Bad(["optim.batch_size=5000"], "do not fill one batch", "lower optim.batch_size"),
        "batch that cannot be balanced": Bad(["data.per_class=7"], "two or more groups of 7", "a multiple of"),
        "unknown backbone": Bad(["model.backbone=vgg"], "model.backbone=vgg is unknown", "choose one of resnet50"),
        "no dimension": Bad(["model.semantic_dim=0"], "model.semantic_dim=0", "to 1 or more"),
    },
)
