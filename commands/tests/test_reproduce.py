"""What is planned, what it costs, how it is launched, and that a failed run harms no other one."""

import json

import pytest

from commands import reproduce
from commands.__main__ import state_of
from commands.reproduce import cost, failures, launch, multiruns, plan, rows_of
from shared.claims.compose import row_config
from shared.claims.evidence import Evidence
from shared.claims.protocol import Paper
from shared.errors import RunInterrupted, UserError
from shared.training.config import evidence_path, failure_path
from shared.training.tests.paper import quick


@pytest.fixture
def toy(paper):
    return Paper("fake", paper.parent)


@pytest.fixture
def launched(toy, start, monkeypatch):
    """Plan and launch in this process: (rows, seeds, overrides) -> exit code and jobs."""
    commands = []

    def run(rows, seeds, *overrides):
        jobs = plan(toy, "demo", rows, seeds, list(overrides))
        monkeypatch.setattr(reproduce, "run_command", lambda line: commands.append(line) or start(line))
        return launch(toy, jobs, "basic", list(overrides)), jobs

    run.commands = commands
    return run


def named(jobs) -> list[tuple[str, int]]:
    return [(cfg.row, cfg.seed) for cfg in jobs]


def make_stale(path) -> bytes:
    """Make the evidence at ``path`` that of another configuration; returns its bytes."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_sha256": "0" * 64}))
    return path.read_bytes()


def test_seeds_go_round_the_outside(toy):
    jobs = plan(toy, "demo", ["plain", "new"], [0, 1], [])
    assert named(jobs) == [("plain", 0), ("new", 0), ("plain", 1), ("new", 1)]
    assert multiruns(jobs) == [(["plain", "new"], [0, 1])]


def test_rows_come_from_the_ledger_and_seeds_from_the_scale(toy):
    assert named(plan(toy, "demo", None, None, [])) == [("plain", 0), ("new", 0)]
    assert named(plan(toy, "lite", None, None, [])) == [("lite-plain", seed) for seed in range(3)]
    assert rows_of(toy, "full") == []


def test_rows_of_full_scale_are_the_claims_that_are_not_blocked_and_then_ours(repository):
    own = "Full:\n  - {Group: g, Metrics: [top1], Rows: [{Row: fake-own, Label: own}]}\n"
    repository.ledger.write_text(repository.ledger.read_text() + own)
    assert rows_of(Paper("fake", repository.root), "full") == ["fake-a", "fake-b", "fake-own"]
    repository.edit("Status: not-run", "Status: blocked")
    assert rows_of(Paper("fake", repository.root), "full") == ["fake-b", "fake-own"]


def test_row_of_another_scale_is_refused(toy):
    with pytest.raises(UserError, match="belongs to scale lite, not demo: say SCALE=lite"):
        plan(toy, "demo", ["plain", "lite-plain"], None, [])
    with pytest.raises(UserError, match="no scale 'large'"):
        plan(toy, "large", None, None, [])


def test_rows_with_evidence_are_dropped_and_stale_evidence_is_measured_again(toy, launched):
    assert launched(["plain", "new"], [0])[0] == 0
    first = plan(toy, "demo", ["plain", "new"], [0, 1], [])
    assert named(first) == [("plain", 1), ("new", 1)]
    path = evidence_path(row_config(toy, "new", 0))
    old = make_stale(path)
    again = plan(toy, "demo", ["plain", "new"], [0], [])
    assert named(again) == [("new", 0)] and path.read_bytes() == old
    assert launched(["plain", "new"], [0])[0] == 0
    assert plan(toy, "demo", ["plain", "new"], [0], []) == []


def test_only_what_was_planned_is_launched(toy, launched):
    launched(["plain"], [0])
    code, jobs = launched(["plain", "new"], [0, 1])
    assert code == 0 and named(jobs) == [("new", 0), ("plain", 1), ("new", 1)]
    assert multiruns(jobs) == [(["new"], [0, 1]), (["plain"], [1])]
    sweeps = [line[-2:] for line in launched.commands[1:]]
    assert sweeps == [["seed=0,1", "+experiment=new"], ["seed=1", "+experiment=plain"]]


def test_a_record_that_says_the_former_name_is_the_evidence_of_the_row(toy, launched):
    launched(["new"], [0])
    cfg = row_config(toy, "new", 0)
    path = evidence_path(cfg)
    path.write_text(path.read_text().replace('"row": "new"', '"row": "older"'))
    assert state_of(Evidence(toy), cfg) == "measured"
    assert named(plan(toy, "demo", ["new"], [0, 1], [])) == [("new", 1)]
    make_stale(path)
    assert state_of(Evidence(toy), cfg) == "stale"
    assert named(plan(toy, "demo", ["new"], [0], [])) == [("new", 0)]


def test_one_failed_job_is_reported_and_the_others_go_on(toy, fake, launched):
    def run(cfg, folder):
        if cfg.row == "plain":
            raise UserError("cube.mat is missing: put it there")
        return quick(cfg, folder)

    fake.run = run
    code, jobs = launched(["plain", "new"], [0, 1])
    assert code == 2
    assert failures(jobs) == {"cube.mat is missing: put it there": ["plain seed 0", "plain seed 1"]}
    assert [evidence_path(cfg).exists() for cfg in jobs] == [False, True, False, True]


def test_an_error_that_is_no_mistake_of_the_user_gives_code_1_wherever_it_stands(toy, fake, launched):
    def run(cfg, folder):
        raise UserError("no cube") if cfg.row == "plain" else ZeroDivisionError("of ours")

    fake.run = run
    code, jobs = launched(["plain", "new"], [0])
    assert code == 1
    assert list(failures(jobs)) == ["no cube", "ZeroDivisionError: of ours"]
    assert "Traceback" in failure_path(jobs[1]).read_text()
    fake.run = quick
    assert launched(["plain", "new"], [0])[0] == 0 and failures(jobs) == {}


def test_a_failure_of_an_earlier_command_is_not_reported_again(toy, fake, launched):
    (cfg,) = plan(toy, "demo", ["plain"], [0], [])
    failure_path(cfg).parent.mkdir(parents=True)
    failure_path(cfg).write_text("of yesterday\nTraceback\n")

    def run(cfg, folder):
        raise RunInterrupted(143)

    fake.run = run
    with pytest.raises(RunInterrupted):
        launched(["plain"], [0])
    assert failures([cfg]) == {}


@pytest.mark.parametrize(("stop", "code"), [(RunInterrupted(143), 143), (KeyboardInterrupt(), 130)])
def test_a_run_that_is_stopped_is_no_failure_and_no_other_run_begins(stop, code, fake, launched):
    begun = []

    def run(cfg, folder):
        begun.append(cfg.row)
        raise stop

    fake.run = run
    with pytest.raises(RunInterrupted) as stopped:
        launched(["plain", "new"], [0])
    assert stopped.value.code == code and begun == ["plain"]


def test_cost_counts_every_run_and_times_every_kind_of_network_once(toy, fake):
    timed = []

    def seconds_of_run(cfg):
        timed.append(cfg.row)
        if cfg.row == "plain":
            raise UserError("no data")
        return 3.0

    fake.seconds_of_run = seconds_of_run
    jobs = plan(toy, "demo", ["plain", "new"], [0, 1], [])
    assert cost(toy, jobs) == 2 * 3.0 and timed == ["plain", "new"]
    with pytest.raises(UserError, match="no data"):
        cost(toy, jobs[:1])


def test_launcher_that_is_not_installed_is_one_sentence_and_code_2(toy, start, monkeypatch, capfd):
    jobs = plan(toy, "demo", ["plain"], [0], [])
    monkeypatch.setattr(reproduce, "run_command", start)
    assert launch(toy, jobs, "slurmy", []) == 2
    assert "hydra/launcher/slurmy" in capfd.readouterr().err and not evidence_path(jobs[0]).exists()


def test_overrides_that_measure_something_else_need_a_place_of_their_own(toy, tmp_path):
    with pytest.raises(UserError, match="RESULTS="):
        plan(toy, "demo", ["plain"], [0], ["scale.steps=3"])
    assert len(plan(toy, "demo", ["plain"], [0], ["scale.steps=3", f"paths.results={tmp_path / 'x'}"])) == 1
