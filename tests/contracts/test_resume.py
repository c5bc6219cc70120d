"""A training that is ended and started again ends with the weights of an unbroken one, bit for bit.

In one process and seed on the CPU, with all on that draws random numbers or keeps tensors beside the weights.
"""

import shutil
import signal

import pytest
import torch

from shared.errors import RunInterrupted
from shared.records import read_record
from shared.testing.applications import call_application
from shared.training.config import evidence_path, run_folder
from tests.contracts.papers import of_papers
from tests.contracts.processes import run_application
from tests.contracts.stops import Stop, Stopped, assert_same, stop_at, train_recording

# What differs from one run to the next of the same numbers.
OF_THE_MACHINE = ("_seconds", "images_per_second", "inference_memory", "resumed")
_unbroken: dict = {}


@pytest.fixture
def unbroken(contract, tmp_path_factory):
    """Weights, further state and batches of an unbroken training, once for each paper."""
    if str(contract) not in _unbroken:
        _unbroken[str(contract)] = train_recording(contract, tmp_path_factory.mktemp("unbroken"), every=10**6)
    return _unbroken[str(contract)]


def assert_continues(contract, folder, every: int, last_stop: int, unbroken) -> None:
    """Train to the end in ``folder`` and compare: weights, state, and the batches since the last checkpoint."""
    weights, state, batches = train_recording(contract, folder, every)
    saved = last_stop // every * every
    assert 0 < saved < last_stop, "the stop lost no step: the case tests nothing"
    assert batches == unbroken[2][saved:], "other batches were consumed"
    assert state == unbroken[1]
    assert_same(weights, unbroken[0])


def stops(contract) -> list[tuple[int, list[int]]]:
    epoch = contract.steps_per_epoch
    return [
        (5, [7]),  # inside the first epoch
        (epoch, [epoch + 1]),  # saved on an epoch's last batch
        (epoch // 2 + 2, [epoch + 6]),  # past an epoch's border
        (3, [5, epoch + 6]),  # two stops in one training
    ]


@of_papers("every", "steps", cases=stops)
def test_resume_after_an_exception_is_bit_identical_past_the_next_epoch_border(
    contract, every, steps, tmp_path, unbroken
):
    assert len(unbroken[2]) == contract.steps > contract.steps_per_epoch
    for step in steps:
        with pytest.raises(Stopped):
            train_recording(contract, tmp_path, every, Stop(step))
    assert_continues(contract, tmp_path, every, steps[-1], unbroken)


@of_papers("number", "code", cases=lambda contract: [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_with_its_own_code_and_it_is_continued(
    contract, number, code, tmp_path, unbroken, caplog
):
    # As at a terminal: behind a shell's & Ctrl-C is ignored, and Lightning ignores further ones while it ends.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(RunInterrupted) as stopped:
            train_recording(contract, tmp_path, 4, Stop(7, number))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == code
    with caplog.at_level("INFO", "shared.training.checkpoints"):
        weights, state, batches = train_recording(contract, tmp_path, 4)
    assert_same(weights, unbroken[0])
    assert state == unbroken[1] and batches == unbroken[2][-len(batches) :] and len(batches) < contract.steps
    assert f"continues after step {contract.steps - len(batches)} of {contract.steps}" in caplog.text


@of_papers(cases=lambda contract: [()] if contract.copies else [])
def test_weights_and_the_average_that_is_kept_of_them_differ(contract, unbroken):
    own, average = contract.copies
    pairs = [
        (unbroken[0][average + name.removeprefix(own)], value)
        for name, value in unbroken[0].items()
        if name.startswith(own) and average + name.removeprefix(own) in unbroken[0]
    ]
    assert pairs and not all(torch.equal(kept, value) for kept, value in pairs)


def numbers(cfg) -> dict:
    """Return what a run has measured, without what is the machine's."""
    metrics = read_record(evidence_path(cfg)).metrics
    return {name: value for name, value in metrics.items() if not name.endswith(OF_THE_MACHINE)}


def weights_of(contract, cfg) -> dict[str, torch.Tensor]:
    """Return all tensors of all checkpoints of a run."""
    return {
        f"{number}.{name}": value
        for number, path in enumerate(contract.checkpoints(cfg))
        for name, value in torch.load(path, weights_only=True)["state_dict"].items()
    }


@of_papers(slow=True)
def test_an_application_that_is_killed_terminated_and_interrupted_ends_as_an_unbroken_one(contract, tmp_path):
    more = [*contract.random, "output.checkpoint_every=4"]
    cfg = contract.config(tmp_path, *more, steps=contract.steps)
    line = contract.overrides(tmp_path, *more, steps=contract.steps)
    signals = ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130))
    for (number, code), (training, step) in zip(signals, contract.stops, strict=True):
        ended = run_application(contract.paper, "train", *line, stop_at(training, step, number))
        assert ended.code == code, ended.err
        if code > 0:
            assert ended.errors == ["interrupted; the same command continues from the last checkpoint"]
        assert not evidence_path(cfg).exists() and not (run_folder(cfg) / "failed.txt").exists()
    ended = run_application(contract.paper, "train", *line)
    assert ended.code == 0, ended.err
    assert read_record(evidence_path(cfg)).metrics["resumed"] == 1
    unbroken = contract.config(tmp_path / "unbroken", *more, steps=contract.steps)
    line = contract.overrides(tmp_path / "unbroken", *more, steps=contract.steps)
    assert run_application(contract.paper, "train", *line).code == 0
    assert numbers(cfg) == numbers(unbroken)
    assert_same(weights_of(contract, cfg), weights_of(contract, unbroken))


@pytest.fixture
def trained(contract, tmp_path):
    """The configuration of a run of seed 0 that has been trained."""
    ended = call_application(contract.paper, "train", *contract.overrides(tmp_path))
    assert ended.code == 0, ended.err
    return contract.config(tmp_path)


CHANGED = {"seed": ["seed=1"], "hash": ["optim.lr=0.0007"], "row": ["row=another"]}


@of_papers("name", cases=lambda contract: [(name,) for name in contract.named_by])
def test_a_checkpoint_of_another_run_is_refused_in_one_sentence_and_stays(contract, name, tmp_path, trained):
    cfg = contract.config(tmp_path, *CHANGED[name])
    records = {path: path.read_bytes() for path in tmp_path.rglob("seed*.json")}
    for own, other in zip(contract.checkpoints(trained), contract.checkpoints(cfg), strict=True):
        assert own != other
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(own, other)
        ended = call_application(contract.paper, "train", *contract.overrides(tmp_path, *CHANGED[name]))
        assert ended.code == 2 and len(ended.errors) == 1, ended.err
        for words in (str(other), "is a checkpoint of ", own.parent.name, "move it away"):
            assert words in ended.err
        assert other.read_bytes() == own.read_bytes()
        other.unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("seed*.json")} == records and records


SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NAME": "visrep",
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
    "SLURM_NNODES": "1",
}


@of_papers(slow=True)
def test_neither_slurms_signal_nor_a_checkpoint_in_the_working_folder_reaches_the_next_seed(contract, tmp_path):
    """Lightning answers SIGUSR1 under Slurm with ``hpc_ckpt_1.ckpt`` in the working folder, and begins from such."""
    where, clean = tmp_path / "where", tmp_path / "clean"
    where.mkdir(), clean.mkdir()
    steps = contract.steps
    line = contract.overrides(where, stop_at(0, 9, signal.SIGUSR1), "output.checkpoint_every=4", steps=steps)
    ended = run_application(contract.paper, "train", *line, cwd=where, **SLURM)
    assert ended.code in (0, -signal.SIGUSR1), ended.err
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    first = contract.checkpoints(contract.config(where, steps=steps))[0]
    shutil.copyfile(first, where / "hpc_ckpt_1.ckpt")
    records = []
    for folder in (where, clean):
        line = contract.overrides(folder, "seed=1", steps=steps)
        ended = run_application(contract.paper, "train", *line, cwd=folder, **SLURM)
        assert ended.code == 0, ended.err
        records.append(read_record(evidence_path(contract.config(folder, "seed=1", steps=steps))))
        assert records[-1].metrics["resumed"] == 0
    left, right = (numbers(contract.config(folder, "seed=1", steps=steps)) for folder in (where, clean))
    assert left == right
