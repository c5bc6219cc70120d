"""A killed run that is started again ends with the weights of an unbroken one, bit for bit (CPU, one seed).

Mixup and CutMix are on, drop path draws from torch's generator, and a moving average of the weights is kept, so all
of them are under test too.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from v2m.tests.small import BATCHES_AN_EPOCH, small_config
from v2m.train import fit, prepare

STEPS = BATCHES_AN_EPOCH + 8  # one epoch border
RANDOM = ["augment.mixup_alpha=0.8", "augment.cutmix_alpha=1.0", "model.network.drop_path=0.2"]


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Ends the run before batch ``step``: by an exception, or with signal 9."""

    def __init__(self, step: int, hard: bool):
        self.step, self.hard = step, hard

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.hard:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed


def run(folder: Path, every: int, kill: Kill | None = None) -> tuple[dict, list]:
    """Train, and return the weights and every batch (epoch, indices) that was consumed."""
    torch.set_num_threads(1)
    cfg = small_config(folder, *RANDOM, f"output.checkpoint_every={every}", steps=STEPS)
    module, data = prepare(cfg)
    consumed = []
    data.batches.__class__ = type(
        "Recording",
        (data.batches.__class__,),
        {
            "__getitem__": lambda self, batch: (
                consumed.append(batch) or super(type(self), self).__getitem__(batch)
            )
        },
    )
    fit(cfg, module, data, folder, callbacks=[kill] if kill else [])
    return module.state_dict(), consumed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken"), every=1000)


def assert_same(found: tuple, expected: tuple, resumed_from: int) -> None:
    assert found[1] == expected[1][resumed_from:], "other batches were seen"
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


@pytest.mark.parametrize(
    ("every", "kill", "resumed_from"),
    [
        (5, 7, 5),  # inside the first epoch
        (BATCHES_AN_EPOCH, BATCHES_AN_EPOCH + 1, BATCHES_AN_EPOCH),  # saved on an epoch's last batch
    ],
)
def test_resume_is_bit_identical_past_the_next_epoch_border(tmp_path, unbroken, every, kill, resumed_from):
    with pytest.raises(Killed):
        run(tmp_path, every, Kill(kill, hard=False))
    assert_same(run(tmp_path, every), unbroken, resumed_from)


def test_weights_and_their_average_differ(unbroken):
    own = {name: value for name, value in unbroken[0].items() if name.startswith("model.")}
    averages = [unbroken[0][name.replace("model.", "average.", 1)] for name in own]
    assert own and not all(torch.equal(a, b) for a, b in zip(own.values(), averages, strict=True))


@pytest.mark.slow
def test_resume_after_kill_9_is_bit_identical(tmp_path, unbroken):
    code = (
        "import sys; from pathlib import Path; from v2m.tests.test_resume import Kill, run; "
        "run(Path(sys.argv[1]), 5, Kill(48, hard=True))"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    assert_same(run(tmp_path, 5), unbroken, 45)
