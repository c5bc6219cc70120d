"""Checkpoints: whole or absent, safe to read, and those of one run only."""

from types import SimpleNamespace

import pytest
import torch

from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.training.checkpoints import AtomicCheckpointIO, Resumption, load_weights, read_checkpoint


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
    with pytest.raises(UserError, match=r"last.ckpt is damaged or no checkpoint \(UnpicklingError\): move it away"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_checkpoint_that_the_disk_damaged_is_one_sentence_and_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "large": torch.zeros(1000)}, path)
    half = path.read_bytes()[:700]
    path.write_bytes(half)
    with pytest.raises(UserError, match="last.ckpt is damaged .* move it away, and the run begins anew"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert path.read_bytes() == half


def test_a_checkpoint_of_a_run_gives_the_networks_tensors_and_steps(tmp_path):
    network, path = torch.nn.Linear(2, 1), tmp_path / "last.ckpt"
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state | {"average.weight": torch.zeros(1)}, "global_step": 7}, path)
    named, steps = read_checkpoint(path)
    assert steps == 7 and set(named) == {"weight", "bias"}
    other = torch.nn.Linear(2, 1)
    load_weights(other, named, "a-row", path)
    assert torch.equal(other.weight, network.weight)
    with pytest.raises(UserError, match="last.ckpt does not fit row a-row: 2 tensors .* such as bias"):
        load_weights(torch.nn.Linear(2, 3), named, "a-row", path)
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match="no checkpoint of a run .*: give the last.ckpt of a run"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="none.ckpt is missing"):
        read_checkpoint(tmp_path / "none.ckpt")


def resumption(folder) -> Resumption:
    return Resumption(folder / "last.ckpt", 2, KeyedBatchSampler(8, 2, 0, 4))


def test_a_checkpoint_is_refused_by_a_run_of_another_row_seed_or_configuration(tmp_path):
    own = resumption(tmp_path / "row" / "seed0-abc")
    own.consumed = 3
    state = own.state_dict()
    again = resumption(tmp_path / "moved" / "row" / "seed0-abc")
    again.load_state_dict(state)
    assert (again.consumed, again.sampler.first_step) == (3, 3)
    for folder in ("other/seed0-abc", "row/seed1-abc", "row/seed0-abd"):
        with pytest.raises(UserError, match="is a checkpoint of row/seed0-abc: move it away"):
            resumption(tmp_path / folder).load_state_dict(state)


def test_the_generator_is_put_back_at_the_first_resumed_batch_and_only_there(tmp_path):
    own = resumption(tmp_path / "row" / "seed0-abc")
    torch.manual_seed(3)
    state, expected = own.state_dict(), torch.rand(2)
    own.load_state_dict(state)
    torch.rand(5)  # what Lightning draws in between
    own.on_train_batch_start(None, None, None, 0)
    assert torch.equal(torch.rand(2), expected)
    own.on_train_batch_start(None, None, None, 1)
    assert not torch.equal(torch.rand(2), expected)


def test_no_checkpoint_is_saved_behind_a_step_that_was_skipped(tmp_path):
    saved, own = [], resumption(tmp_path / "row" / "seed0-abc")
    trainer = SimpleNamespace(num_training_batches=10, save_checkpoint=lambda path: saved.append(own.consumed))
    for step in range(8):
        module = SimpleNamespace(skipped_in_a_row=int(step in (2, 3)))
        own.on_train_batch_end(trainer, module, None, None, step)
    assert saved == [2, 6, 8]
