"""What the contract tests need to know of GlobalMamba."""

import functools
from pathlib import Path

from omegaconf import OmegaConf

from globalmamba import train
from shared.claims.protocol import Paper
from shared.testing.contract import Bad, Contract, Training

BATCHES_AN_EPOCH = 44  # of 32 digits
SMALL = [
    "model.network.embed_dim=16",
    "model.network.depth=2",
    "model.network.state_dim=2",
    "model.tokens.patch_size=2",
    "model.tokens.levels=3",
    "optim.batch_size=32",
    "optim.ema_decay=0.9",
    "output.pictures=false",
    "output.validate_every=1",
    "trainer.accelerator=cpu",
    "trainer.backend=chunked",
    "logger=none",
]
MIXED = ["augment.mixup_alpha=0.8", "augment.cutmix_alpha=1.0"]
# What makes any row tiny: the digits, few and narrow layers.
TOY = {
    "data.manifest": "digits",
    "data.classes": 10,
    "data.train_images": None,
    "optim.batch_size": 4,
    "optim.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.backend": "chunked",
    "trainer.devices": 1,
    "trainer.workers": 0,
    # One path in so shallow a network would often be dropped whole, and its parameters with it.
    "model.network.drop_path": 0.0,
}
# Eight tokens a side: enough for four levels.
PLAIN = {"data.image_size": 8, "model.tokens.patch_size": 1, "model.network.embed_dim": 12, "model.network.depth": 2}
# Two tokens a side at the last stage: the scan of a single one has no past, so its A would have no gradient.
PYRAMID = {"data.image_size": 64, "model.network.dims": 8, "model.network.depths": [1, 1, 1, 1]}
# Behind the last block only the class token is read. Where it is the last token, the way back begins at it: the
# state has no past there either.
NO_PAST = dict.fromkeys(("cifar10-gm-class-last", "gm-in1k-m-class-last"), {"layers.1.mixer.A_b_log"})


def length(steps: int) -> list[str]:
    return [f"scale.epochs={steps / BATCHES_AN_EPOCH}", "optim.warmup_epochs=0.02"]


def prepare(cfg, folder) -> Training:
    module, data = train.prepare(cfg)
    return Training(module, data, functools.partial(train.fit, cfg, module, data, folder))


def losses(module, batch, number):
    return module.loss(batch, number)[None]


def after_step(module) -> None:
    module.update_average()


def toy(cfg) -> None:
    for key, value in (TOY | (PYRAMID if cfg.model.tokens is None else PLAIN)).items():
        OmegaConf.update(cfg, key, value)


def dead(cfg, network) -> tuple[set[str], set[str]]:
    names = NO_PAST.get(cfg.row, set())
    return names, names


CONTRACT = Contract(
    paper=Paper("globalmamba", Path(__file__).parents[2]),
    row="digits-gm",
    small=SMALL,
    length=length,
    prepare=prepare,
    # Drop path draws from torch's generator, mixtures from keys; an average of the weights is kept.
    random=[*MIXED, "model.network.drop_path=0.2"],
    steps_per_epoch=BATCHES_AN_EPOCH,
    steps=BATCHES_AN_EPOCH + 8,
    copies=("model.", "average."),
    stops=[(0, 9), (0, 29), (0, 49)],
    # No drop path, which every rank draws for itself.
    rank_cases={"mixed": [*MIXED, "optim.batch_size=8"], "unequal": ["optim.batch_size=7"]},
    losses=losses,
    after_step=after_step,
    is_share=True,
    mixed=["augment.mixup_alpha=0.8", "optim.batch_size=6"],
    unfit=["model.network.embed_dim=8"],
    misspelt=("cifar10-gn", "cifar10-gm"),
    unknown_keys=("optim.lrr", "data.sizes", "nothing", "augment.mixup"),
    differing=({"row", "model"}, {"variant"}),
    toy=toy,
    dead=dead,
    pictures=("receptive_field.png",),
    draw=["output.pictures=true"],
    bad={
        "image smaller than a patch": Bad(["model.tokens.patch_size=16"], "smaller than a patch", "lower patch_size"),
        "size that the patches do not divide": Bad(["model.tokens.patch_size=3"], "no whole number of", "change one"),
        "K that leaves a level empty": Bad(
            ["model.tokens.patch_size=1", "model.tokens.levels=5"], "empty", "use at most 4 levels"
        ),
        "K out of range": Bad(["model.tokens.levels=1"], "levels is 1", "choose from 2 to 6"),
        "size that the levels of a pyramid do not divide": Bad(
            ["data=digits", "data.image_size=40", "model.network.dims=8"],
            "do not divide images of 40 x 40",
            "multiples of 16",
            row="cifar10-gm-pyramid",
        ),
        "unknown order": Bad(["model.tokens.order=sideways"], "order is 'sideways'", "choose from low-high"),
        "variant that was never released": Bad(
            ["variant=as_released"], "is not implemented for a network like", "or variant=as_written"
        ),
        "no time to train": Bad(["scale.epochs=-1"], "scale.epochs=-1", "give a positive number"),
        "patch of no pixels": Bad(["model.tokens.patch_size=0"], "patch_size is 0", "1 or more"),
        "unknown backend": Bad(["trainer.backend=fast"], "trainer.backend=fast", "choose one of auto"),
        "no such augmentation": Bad(["augment.crop=round"], "crop = round", "set random-resized or pad"),
        "batch larger than the data": Bad(["optim.batch_size=5000"], "do not fill one batch", "lower optim.batch_size"),
        "subset larger than the data": Bad(["data.train_images=5000"], "a subset of 5000", "ask for 1 to"),
        "no data root": Bad([], "data root is not set", "set DATA_ROOT=<folder>", row="cifar10-gm"),
        "two lengths of a segmenter's training": Bad(
            ["dense.steps=3"], "dense.epochs=8.0 and dense.steps=3", "set one of them", row="gm-camvid-vmamba"
        ),
    },
    bad_evaluation={
        "unknown backend": Bad(["trainer.backend=fast"], "trainer.backend=fast is not supported", "choose one of auto")
    },
)
