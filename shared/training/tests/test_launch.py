"""Launching: what is planned, what it costs, and that a failed or concurrent run harms no other one."""

import json
import logging
import multiprocessing
import os
import signal

import pytest

from shared.claims.reproduce import cost, failures, launch, plan, rows_of
from shared.errors import UserError
from shared.run.tests.conftest import OWN, PLAIN
from shared.training.application import evidence_path, folder_lock, run_folder, run_row


def named(jobs) -> list[tuple[str, int]]:
    return [(cfg.row, cfg.seed) for _, cfg in jobs]


def stale(path) -> bytes:
    """Make the evidence at ``path`` that of another configuration; returns its bytes."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_sha256": "0" * 64}))
    return path.read_bytes()


def test_seeds_go_round_the_outside(there):
    jobs = plan("pdml", "demo", [PLAIN, OWN], [0, 1], there)
    assert named(jobs) == [(PLAIN, 0), (OWN, 0), (PLAIN, 1), (OWN, 1)]
    assert [overrides[:2] for overrides, _ in jobs] == [
        [f"+experiment={r}", f"seed={s}"] for r, s in named(jobs)
    ]


def test_rows_come_from_the_ledger_and_seeds_from_the_scale(there):
    assert named(plan("pdml", "demo", None, None, there)) == [(row, 0) for row in rows_of("pdml", "demo")]
    assert "pdml-ksc" in rows_of("pdml", "full") and "jasper-random-ssrn-plain" in rows_of("pdml", "lite")


def test_row_of_another_scale_is_refused(there):
    with pytest.raises(UserError, match="belongs to scale lite, not demo: say SCALE=lite"):
        plan("pdml", "demo", [PLAIN, "jasper-random-ssrn-plain"], None, there)
    with pytest.raises(UserError, match="no scale 'large'"):
        plan("pdml", "large", None, None, there)


def test_rows_with_evidence_are_dropped_and_stale_evidence_is_measured_again(fake, there):
    first = plan("pdml", "demo", [PLAIN, OWN], [0, 1], there)
    assert failures(launch("pdml", first[:2], "basic")) == []
    assert named(plan("pdml", "demo", [PLAIN, OWN], [0, 1], there)) == [(PLAIN, 1), (OWN, 1)]
    path = evidence_path(first[1][1])
    old = stale(path)
    again = plan("pdml", "demo", [PLAIN, OWN], [0], there)
    assert named(again) == [(OWN, 0)] and path.read_bytes() == old
    launch("pdml", again, "basic")
    assert plan("pdml", "demo", [PLAIN, OWN], [0], there) == []


def test_one_failed_job_is_reported_and_the_others_go_on(fake, there, caplog):
    def run(cfg, folder):
        if cfg.row == PLAIN:
            raise UserError("cube.mat is missing: put it there")
        return {"n_test": 10.0, "oa": 0.25}

    fake.run = run
    jobs = plan("pdml", "demo", [PLAIN, OWN], [0], there)
    with caplog.at_level(logging.INFO, "shared.claims.reproduce"):
        ((name, error),) = failures(launch("pdml", jobs, "basic"))
    assert name == f"{PLAIN} seed 0" and str(error) == "cube.mat is missing: put it there"
    assert [evidence_path(cfg).exists() for _, cfg in jobs] == [False, True]
    assert f"{OWN} seed 0: OA % 25.00" in caplog.text


def test_evidence_is_written_at_the_end_and_never_by_a_run_that_failed(fake, there):
    ((_, cfg),) = plan("pdml", "demo", [PLAIN], [0], there)
    path, seen = evidence_path(cfg), []

    def run(cfg, folder):
        seen.append(path.exists())
        (folder / "last.ckpt").write_bytes(b"half-way")
        if len(seen) == 1:
            raise RuntimeError("killed")
        return {"n_test": 10.0, "oa": 0.25}

    fake.run = run
    with pytest.raises(RuntimeError):
        run_row(cfg)
    assert not path.exists()
    assert run_row(cfg) == "measured" and seen == [False, False]
    assert json.loads(path.read_text())["metrics"] == {"oa": 0.25, "resumed": 1.0}
    old, seen[:] = stale(path), []
    with pytest.raises(RuntimeError):
        run_row(cfg)
    assert path.read_bytes() == old and (run_folder(cfg) / "last.ckpt").read_bytes() == b"half-way"


def _hold(folder, connection):
    with folder_lock(folder) as mine:
        connection.send(mine)
        signal.pause()


def test_two_processes_do_not_run_the_same_row_and_seed_and_a_killed_one_lets_go(fake, there):
    ((_, cfg), (_, other)) = plan("pdml", "demo", [PLAIN], [0, 1], there)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(run_folder(cfg), theirs))
    process.start()
    try:
        assert ours.poll(60) and ours.recv()
        assert run_row(cfg) == "running elsewhere" and not evidence_path(cfg).exists()
        assert run_row(other) == "measured"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert run_row(cfg) == "measured"


def test_cost_counts_every_run_and_times_every_kind_of_network_once(fake, there):
    timed = []

    def seconds_of_run(cfg):
        timed.append(cfg.row)
        if cfg.row == PLAIN:
            raise UserError("no data")
        return {OWN: 3.0}.get(cfg.row, 5.0)

    fake.seconds_of_run = seconds_of_run
    same_kind = "synthetic-disjoint-ssrn-plain"
    jobs = plan("pdml", "demo", [PLAIN, OWN, same_kind], [0, 1], there)
    assert cost("pdml", jobs) == 4 * 5.0 + 2 * 3.0
    assert sorted(timed) == sorted([PLAIN, OWN, same_kind])
    with pytest.raises(UserError, match="no data"):
        cost("pdml", plan("pdml", "demo", [PLAIN], [0, 1], there))


def test_launcher_that_is_not_installed_is_one_sentence(fake, there):
    with pytest.raises(UserError, match="no launcher 'slurmy'.*LAUNCHER=basic"):
        launch("pdml", plan("pdml", "demo", [PLAIN], [0], there), "slurmy")


def test_overrides_that_measure_something_else_need_a_place_of_their_own(tmp_path):
    row = "synthetic-random-ssrn-plain"
    with pytest.raises(UserError, match="RESULTS="):
        plan("pdml", "demo", [row], [0], ["scale.steps=3"])
    assert len(plan("pdml", "demo", [row], [0], ["scale.steps=3", f"paths.results={tmp_path}"])) == 1
