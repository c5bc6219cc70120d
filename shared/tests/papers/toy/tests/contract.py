"""What the contract tests need to know of the toy paper."""

import functools
from pathlib import Path

from shared.claims.protocol import Paper
from shared.testing.contract import Bad, Contract, Training
from shared.training.fit import fit

from .. import train


def length(steps: int) -> list[str]:
    return [f"scale.steps={steps}"]


def prepare(cfg, folder) -> Training:
    module, data = train.prepare(cfg)
    return Training(module, data, functools.partial(fit, cfg, module, data, folder))


def losses(module, batch, number):
    return module.loss(batch, number)[None]


def toy(cfg) -> None:
    cfg.optim.batch_size = 16


CONTRACT = Contract(
    paper=Paper("toy", Path(__file__).parents[2]),
    row="toy-dropout",
    small=["trainer.accelerator=cpu", "logger=none"],
    length=length,
    prepare=prepare,
    steps_per_epoch=44,
    steps=52,
    stops=[(0, 9), (0, 19), (0, 49)],
    rank_cases={"plain": ["model.dropout=0"], "unequal": ["model.dropout=0", "optim.batch_size=7"]},
    losses=losses,
    is_share=True,
    rank_run=["model.dropout=0"],
    misspelt=("toy-plane", "toy-plain"),
    gives_epochs=False,
    differing=({"row", "model"}, set()),
    toy=toy,
    bad={
        "batch larger than the data": Bad(["optim.batch_size=5000"], "do not fill one batch", "lower optim.batch_size"),
        "no steps": Bad(["scale.steps=0"], "0 steps of 32 samples", "set scale.steps"),
    },
)
