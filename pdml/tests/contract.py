"""What the contract tests need to know of PDML."""

import functools
from pathlib import Path

from pdml import train
from shared.claims.protocol import Paper
from shared.testing.contract import Bad, Contract, Training
from shared.training.fit import fit
from shared.training.ranks import with_global_batchnorm, world_size

BATCHES_AN_EPOCH = 14  # of 8 pixels
SMALL = [
    "model=ssftt",  # draws dropout masks from torch's generator
    "patch_size=5",
    "optim.batch_size=8",
    "output.maps=false",
    "output.region=scored",
    "trainer.accelerator=cpu",
    "logger=none",
]
# Without dropout: every rank draws its own masks.
ON_RANKS = ["model=ssrn", "model.backbone.dropout=0.0"]


def length(steps: int) -> list[str]:
    return [f"scale.steps={steps}"]


def prepare(cfg, folder) -> Training:
    _, _, module, data = train.prepare(cfg)
    if world_size() > 1:  # a Trainer does so in `setup`
        module.model = with_global_batchnorm(module.model)
    return Training(module, data, functools.partial(fit, cfg, module, data, folder))


def losses(module, batch, number):
    module.log_dict = lambda *_, **__: None  # no Trainer here
    return module.training_step(batch, number)[None]


def labelled(batch) -> int:
    return int((batch.labels > 0).sum())


CONTRACT = Contract(
    paper=Paper("pdml", Path(__file__).parents[2]),
    row="synthetic-random-ssrn-pdml",
    small=SMALL,
    length=length,
    prepare=prepare,
    steps_per_epoch=BATCHES_AN_EPOCH,
    steps=2 * BATCHES_AN_EPOCH + 6,  # two epoch borders
    stops=[(0, 9), (0, 19), (0, 29)],
    rank_cases={"unequal": ON_RANKS},
    losses=losses,
    labelled=labelled,
    rank_run=ON_RANKS,
    unfit=["model=ssrn"],
    misspelt=("jasper-random-ssrn-pdm", "jasper-random-ssrn-pdml"),
    unknown_keys=("optim.lrr", "data.split.blocks", "nothing", "method.model.widht"),
    gives_epochs=False,  # its settings are not known
    differing=({"row"}, {"method", "model"}),  # test_configs.py says which
    scores=("oa", "aa"),
    draw=["output.maps=true", "output.region=scene"],
    pictures=("classification.png", "uncertainty.png"),
    bad={
        "batch larger than the data": Bad(["optim.batch_size=5000"], "do not fill one batch", "lower optim.batch_size"),
        "even patch size": Bad(["patch_size=4"], "", "set an odd one, such as 5"),
        "no data root": Bad([], "data root is not set", "set DATA_ROOT=<folder>", row="jasper-random-ssrn-plain"),
    },
)
