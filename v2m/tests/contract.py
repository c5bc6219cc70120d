"""What the contract tests need to know of V2M."""

import functools
from pathlib import Path

from omegaconf import OmegaConf

from shared.claims.protocol import Paper
from shared.testing.contract import Bad, Contract, Training
from v2m import train

BATCHES_AN_EPOCH = 44  # of 32 digits
SMALL = [
    "model.network.embed_dim=16",
    "model.network.depth=2",
    "model.network.patch_size=2",
    "model.network.mixer.state_dim=2",
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
PLAIN = {"data.image_size": 8, "model.network.patch_size": 2, "model.network.embed_dim": 12, "model.network.depth": 2}
# Two tokens a side at the last stage: the scan of a single one has no past, so its A would have no gradient.
PYRAMID = {"data.image_size": 64, "model.network.dims": 8, "model.network.depths": [1, 1, 1, 1]}
# The general recurrence begins without a way back, p2 = 0, and q2 is multiplied by it: it has a gradient from the
# second step on.
LATE = {f"layers.{i}.mixer.q2" for i in range(PLAIN["model.network.depth"])}


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
    for key, value in (TOY | (PLAIN if "image_size" in cfg.model.network else PYRAMID)).items():
        OmegaConf.update(cfg, key, value)


def dead(cfg, network) -> tuple[set[str], set[str]]:
    names = LATE if "roesser" in cfg.row else set()
    return names, names


CONTRACT = Contract(
    paper=Paper("v2m", Path(__file__).parents[2]),
    row="digits-v2m",
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
    misspelt=("cifar10-v2n", "cifar10-v2m"),
    unknown_keys=("optim.lrr", "data.sizes", "nothing", "augment.mixup"),
    differing=({"row", "model"}, {"variant", "scale"}),
    toy=toy,
    dead=dead,
    pictures=("receptive_field.png",),
    draw=["output.pictures=true"],
    bad={
        "size that the patches do not tile": Bad(
            ["model.network.patch_size=3"], "patches of 3 do not tile an image of 8 x 8", "multiples of patch_size"
        ),
        "patch of no pixels": Bad(["model.network.patch_size=0"], "patches of 0 do not tile", "multiples of"),
        "unknown class token": Bad(["model.network.class_token=first"], "class_token 'first'", "choose one of mean"),
        "unknown corners": Bad(["model.network.mixer.corners=3"], "corners 3 is unknown", "choose one of 1, 2, 4"),
        "unknown composition": Bad(
            ["model.network.mixer.composition=woven"], "composition 'woven' is unknown", "choose one of sequential"
        ),
        "negative window": Bad(
            ["model.network.mixer.window=-1"], "window -1 is no number of tokens", "or 0 for the whole grid"
        ),
        "broken window": Bad(["model.network.mixer.window=1.5"], "window 1.5 is no number", "or 0 for the whole"),
        "corners of a word": Bad(["model.network.mixer.corners=true"], "corners True is unknown", "choose one of 1"),
        "order without its corners": Bad(
            ["model.network.mixer.order=rotated", "model.network.mixer.corners=2"],
            "order rotated turns the image",
            "set corners 4",
        ),
        "no state": Bad(["model.network.mixer.state_dim=0"], "state_dim 0", "give 1 to 64 states"),
        "more states than a scan has": Bad(["model.network.mixer.state_dim=65"], "state_dim 65", "give 1 to 64"),
        "no tap": Bad(["model.network.mixer.conv_kernel=0"], "conv_kernel 0", "1 tap or more"),
        "no block": Bad(["model.network.depth=0"], "depth 0", "give 1 block or more"),
        "drop path of two": Bad(["model.network.drop_path=2"], "drop_path 2", "rates of 0 or more, below 1"),
        "one class token in a plane": Bad(
            ["model.network.class_token=middle"], "makes the grid one row", "choose middle_cross or mean"
        ),
        "variant that was never released": Bad(
            ["variant=as_released"], "is not implemented for a network like", "or variant=as_written"
        ),
        "no time to train": Bad(["scale.epochs=-1"], "scale.epochs=-1", "give a positive number"),
        "unknown backend": Bad(["trainer.backend=fast"], "trainer.backend=fast", "choose one of auto"),
        "no such augmentation": Bad(["augment.crop=round"], "crop = round", "set random-resized or pad"),
        "batch larger than the data": Bad(["optim.batch_size=5000"], "do not fill one batch", "lower optim.batch_size"),
        "subset larger than the data": Bad(["data.train_images=5000"], "a subset of 5000", "ask for 1 to"),
        "no data root": Bad([], "data root is not set", "set DATA_ROOT=<folder>", row="cifar10-v2m"),
        "two lengths of a segmenter's training": Bad(
            ["dense.steps=3"], "dense.epochs=8.0 and dense.steps=3", "set one of them", row="v2m-camvid-vmamba"
        ),
    },
    bad_evaluation={
        "unknown backend": Bad(["trainer.backend=fast"], "trainer.backend=fast is not supported", "choose one of auto")
    },
)
