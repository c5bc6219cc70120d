"""A process for each device: what comes back where a signal or bad input ends them."""

import signal
import sys
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from shared.claims.compose import row_config
from shared.errors import RunInterrupted, UserError
from shared.run import processes
from shared.run.tests.conftest import PLAIN


@pytest.fixture
def launched(fake, monkeypatch, tmp_path):
    """Run in processes with something else in the place of the launcher."""
    fake.prepare = lambda cfg: None

    def run(outcome):
        monkeypatch.setattr(api, "elastic_launch", lambda config, program: outcome)
        return processes.run_in_processes(row_config("pdml", PLAIN, 0), tmp_path)

    return run


def test_a_signal_to_the_launcher_stops_the_command(launched):
    def outcome(*arguments):
        signal.signal(signal.SIGTERM, lambda *received: None)  # as the launcher does
        raise SignalException("death signal", signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunInterrupted) as stopped:
        launched(outcome)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("code", "wanted"), [(143, RunInterrupted), (1, RuntimeError), (-11, RuntimeError)])
def test_a_process_that_failed_is_an_error_and_one_that_was_stopped_is_not(launched, code, wanted):
    def outcome(*arguments):
        failure = SimpleNamespace(exitcode=code, timestamp=0, message="", pid=1, local_rank=0)
        error = ChildFailedError.__new__(ChildFailedError)
        error.failures = {1: failure}
        raise error

    with pytest.raises(wanted):
        launched(outcome)


def test_what_the_first_process_wrote_comes_back(launched, tmp_path):
    def outcome(*arguments):
        (tmp_path / processes.OUTCOME).write_text('{"metrics": {"oa": 0.5}, "peak_memory_bytes": 7}')

    assert launched(outcome) == ({"oa": 0.5}, 7)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("a cube is missing"), 2), (RunInterrupted(143), 143)],
    ids=["bad input", "signal"],
)
def test_a_process_ends_with_the_code_of_what_ended_its_run(fake, tmp_path, error, code):
    def run(cfg, folder):
        raise error

    fake.run = run
    (tmp_path / processes.JOB).write_text("paper: pdml\n")
    assert processes.main(tmp_path) == code and "pdml.train" in sys.modules
    refused = tmp_path / processes.REFUSED
    assert refused.exists() == (code == 2) and (code != 2 or refused.read_text() == "a cube is missing")
