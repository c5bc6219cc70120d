"""Ranks give what one process gives: weights, losses, statistics, and the record of a run, however they are started.

Tolerance 1e-10 relative for weights and losses, in float64: the ranks add the same numbers in another order. A run's
scores come out of more such sums (``Contract.rank_tolerance``).
"""

import pytest
import torch

from shared.errors import UserError
from shared.records import RunRecord, read_record
from shared.testing.applications import Finished
from shared.testing.gloo import free_port, on_ranks
from shared.training.config import evidence_path
from tests.contracts.papers import of_papers
from tests.contracts.processes import finish, run_application, start_command
from tests.contracts.ranks import train_case, train_cases
from tests.contracts.test_resume import OF_THE_MACHINE

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
_two: dict = {}


@pytest.fixture
def two(contract, tmp_path_factory):
    """What two ranks give for every case of a paper, once for each paper."""
    if str(contract) not in _two:
        folder = tmp_path_factory.mktemp("ranks")
        _two[str(contract)] = on_ranks(2, train_cases, folder, 2, contract, folder)
    return _two[str(contract)]


@of_papers("case", cases=lambda contract: [(case,) for case in contract.rank_cases], slow=True)
def test_two_ranks_equal_one_process(contract, case, two, tmp_path):
    single = train_case(0, 1, contract, tmp_path, case)
    both = [ranks[case] for ranks in two]
    counts = [ranks["counts"] for ranks in both]
    assert [sum(pair) for pair in zip(*counts, strict=True)] == single["counts"]
    assert (counts[0] != counts[1]) or case != "unequal", "the case under test is unequal counts"
    mean = (both[0]["losses"] + both[1]["losses"]) / 2
    for losses in [mean] if contract.is_share else [ranks["losses"] for ranks in both]:
        torch.testing.assert_close(losses, single["losses"], **CLOSE)
    for ranks in both:
        assert ranks["weights"].keys() == single["weights"].keys()
        for name, value in single["weights"].items():
            torch.testing.assert_close(ranks["weights"][name], value, **CLOSE, msg=name)


def refusals(contract) -> list[tuple]:
    return [()] if contract.mixed else []


@of_papers(cases=refusals)
def test_a_batch_that_ranks_cannot_mix_alike_is_refused(contract, tmp_path):
    data = contract.prepare(contract.config(tmp_path, *contract.mixed), tmp_path).data
    data.require_equal_pairs(3)
    with pytest.raises(UserError, match="optim.batch_size.*multiple of 4"):
        data.require_equal_pairs(2)


@of_papers(cases=refusals)
def test_any_batch_may_be_shared_where_nothing_is_mixed(contract, tmp_path):
    unequal = [*contract.rank_cases["unequal"], "optim.batch_size=7"]
    data = contract.prepare(contract.config(tmp_path, *unequal), tmp_path).data
    for ranks in (2, 3, 4):
        data.require_equal_pairs(ranks)  # raises where a batch must not be shared so


def line(contract, folder, *more: str) -> list[str]:
    steps = min(contract.steps, 6)
    return contract.overrides(folder, *contract.rank_run, "optim.precision=64-true", *more, steps=steps)


def record(contract, folder, seed: int = 0) -> RunRecord:
    steps = min(contract.steps, 6)
    more = [*contract.rank_run, "optim.precision=64-true", f"seed={seed}"]
    return read_record(evidence_path(contract.config(folder, *more, steps=steps)))


def assert_equal(contract, ranks: RunRecord, single: RunRecord) -> None:
    assert ranks.config_sha256 == single.config_sha256 and ranks.n_test == single.n_test
    assert ranks.metrics.keys() == single.metrics.keys()
    compared = [name for name in single.metrics if not name.endswith(OF_THE_MACHINE)]
    assert len(compared) > 2
    for name in compared:
        expected = single.metrics[name]
        if isinstance(expected, float):
            expected = pytest.approx(expected, rel=contract.rank_tolerance)
        elif isinstance(expected, list):
            expected = pytest.approx([value or 0 for value in expected], rel=contract.rank_tolerance)
            ranks.metrics[name] = [value or 0 for value in ranks.metrics[name]]
        assert ranks.metrics[name] == expected, name


def module(contract) -> str:
    return f"{contract.paper.name}.train"


def with_torchrun(contract, folder) -> list[Finished]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module(contract)]
    return finish(start_command(*start, *line(contract, folder)))


def with_two_nodes(contract, folder) -> list[Finished]:
    port = free_port()
    nodes = []
    for node in range(2):
        where = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1"]
        start = ["-m", "torch.distributed.run", *where, "--master-port", str(port), "--nproc-per-node", "1"]
        nodes.append(start_command(*start, "-m", module(contract), *line(contract, folder)))
    return finish(*nodes)


def with_two_devices(contract, folder, seeds: str = "0") -> list[Finished]:
    """A job of a multirun, which runs the very command by which a user would start two devices."""
    devices = line(contract, folder, f"seed={seeds}", "trainer.devices=2", "trainer.strategy=ddp")
    return finish(start_command("-m", module(contract), "-m", *devices))


STARTS = {"torchrun": with_torchrun, "two nodes": with_two_nodes, "two devices": with_two_devices}


@pytest.fixture(scope="module")
def singles():
    return {}


@pytest.fixture
def single(contract, singles, tmp_path_factory):
    """The record of one process, which every start of a paper is compared with."""
    if str(contract) not in singles:
        folder = tmp_path_factory.mktemp("single")
        ended = run_application(contract.paper, "train", *line(contract, folder))
        assert ended.code == 0, ended.err
        singles[str(contract)] = record(contract, folder)
    return singles[str(contract)].model_copy(deep=True)


@of_papers("start", cases=lambda contract: [(name,) for name in STARTS], slow=True)
def test_ranks_give_the_record_of_one_process(contract, start, single, tmp_path):
    for ended in STARTS[start](contract, tmp_path):
        assert ended.code == 0, ended.err[-3000:]
    assert_equal(contract, record(contract, tmp_path), single)


@of_papers(cases=lambda contract: [()] if str(contract) == "toy" else [], slow=True)
def test_a_multirun_on_two_devices_gives_the_records_of_one_process(contract, tmp_path):
    # A job is a process of its own, so that what several of them share is no paper's.
    both, alone = tmp_path / "both", tmp_path / "alone"
    (ended,) = with_two_devices(contract, both, "0,1")
    assert ended.code == 0, ended.err[-3000:]
    ended = run_application(contract.paper, "train", "-m", *line(contract, alone, "seed=0,1"))
    assert ended.code == 0, ended.err
    for seed in (0, 1):
        assert_equal(contract, record(contract, both, seed), record(contract, alone, seed))


@of_papers(slow=True, twins=False)
def test_bad_input_on_two_devices_is_said_in_one_sentence_and_recorded_nowhere(contract, tmp_path):
    bad = contract.mixed or ["optim.batch_size=1"]
    words = "set optim.batch_size to a multiple of 4" if contract.mixed else "use fewer ranks"
    devices = ["trainer.devices=2", "trainer.strategy=ddp", *bad]
    (ended,) = finish(start_command("-m", module(contract), *line(contract, tmp_path, *devices)))
    assert ended.code == 2, ended.err[-3000:]
    assert words in ended.err and "Traceback" not in ended.err
    assert not list(tmp_path.rglob("seed*.json"))


@of_papers(cases=lambda contract: [()] if str(contract) == "toy" else [], slow=True)
def test_a_training_that_diverges_on_two_devices_stops_on_both_and_is_recorded_nowhere(contract, tmp_path):
    devices = ["trainer.devices=2", "trainer.strategy=ddp", "optim.lr=1e30"]
    command = contract.overrides(tmp_path, *contract.rank_run, *devices, steps=30)
    (ended,) = finish(start_command("-m", module(contract), *command))
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err[-3000:]
    assert "the training diverged: 10 of 1" in ended.err and "learning rate 1e+30" in ended.err
    assert not list(tmp_path.rglob("seed*.json"))
