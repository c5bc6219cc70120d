"""A killed run that is started again ends with the weights of an unbroken one, bit for bit (CPU, one seed).

Mixtures and the drawing sampler are on, and classes are held out, so the state of all of them is under test too.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from idml.selection import EpochSelection
from idml.tests.small import INTROSPECTIVE, small_config
from idml.train import fit, prepare

# Two of five classes are held out: 542 images of three classes, 17 batches of 32 in groups of 4.
DRAWN = [*INTROSPECTIVE, "loss=margin", "data.per_class=4", "data.held_out=0.4", "selection=held-out"]
EPOCHS = 2


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


def run(folder: Path, every: int, kill: Kill | None = None) -> tuple[dict, dict, list]:
    """Train, and return the weights, the curves of the epochs and every batch (epoch, indices) that was consumed."""
    torch.set_num_threads(1)
    cfg = small_config(folder, *DRAWN, f"output.checkpoint_every={every}", epochs=EPOCHS)
    module, data, sets = prepare(cfg)
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
    selection = EpochSelection(cfg, folder, sets, module.steps_per_epoch)
    fit(cfg, module, data, folder, callbacks=[selection, *([kill] if kill else [])])
    return module.state_dict(), selection.curves, consumed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken"), every=1000)


def assert_same(found: tuple, expected: tuple, resumed_from: int) -> None:
    assert found[2] == expected[2][resumed_from:], "other batches were seen"
    assert found[1] == expected[1]
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


@pytest.mark.parametrize(("every", "kill", "resumed_from"), [(5, 8, 5), (17, 20, 17)])
def test_resume_is_bit_identical_past_the_next_epoch_border(tmp_path, unbroken, every, kill, resumed_from):
    assert len(unbroken[2]) == 2 * 17 and sorted(unbroken[1]) == ["best-test-epoch", "held-out"]
    with pytest.raises(Killed):
        run(tmp_path, every, Kill(kill, hard=False))
    assert_same(run(tmp_path, every), unbroken, resumed_from)


@pytest.mark.slow
def test_resume_after_kill_9_is_bit_identical(tmp_path, unbroken):
    code = (
        "import sys; from pathlib import Path; from idml.tests.test_resume import Kill, run; "
        "run(Path(sys.argv[1]), 5, Kill(22, hard=True))"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    assert_same(run(tmp_path, 5), unbroken, 20)
