"""Checkpoints: whole or absent, and safe to read."""

import pytest
import torch

from shared.errors import UserError
from shared.training.resumption import AtomicCheckpointIO


class Dies:
    """Cannot be written: stands for a disk that fills or a process that is killed half-way."""

    def __reduce__(self):
        raise OSError("no space left")


def test_a_half_written_checkpoint_is_never_the_latest(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "large": torch.zeros(1000), "end": Dies()}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"function": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(
        UserError, match=r"last.ckpt is damaged or no checkpoint \(UnpicklingError\): move it away"
    ):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_checkpoint_that_the_disk_damaged_is_one_sentence_and_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "large": torch.zeros(1000)}, path)
    half = path.read_bytes()[:700]
    path.write_bytes(half)
    with pytest.raises(UserError, match="last.ckpt is damaged .* move it away, and the run begins anew"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert path.read_bytes() == half
