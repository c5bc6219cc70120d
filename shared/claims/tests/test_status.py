"""Statuses follow from evidence."""

import pytest

from shared.claims.ledger import Ledger
from shared.claims.protocol import Paper
from shared.claims.status import Derived


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.760, 0.762, 0.764], "reproduced"),
        ([0.765, 0.765, 0.765], "reproduced"),  # exactly the tolerance
        ([0.759, 0.759, 0.759], "reproduced"),
        ([0.750, 0.751, 0.752], "below"),
        ([0.770, 0.771, 0.772], "above"),
        ([0.762, 0.762], "not-run"),  # three seeds at least
    ],
)
def test_status_follows_from_the_mean_of_three_seeds(repository, status, values, expected):
    repository.run("fake-a", values)
    assert status().status == expected
    assert status().n == len(values)


def test_order_reversed_with_an_interval_that_excludes_zero_is_contradicted(repository, status):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    repository.run("fake-b", [0.7705, 0.7719, 0.7741])
    assert status().status == "contradicted"
    repository.run("fake-b", [0.750, 0.790, 0.7741])  # better on average, but the interval holds 0
    assert status().status == "reproduced"
    repository.run("fake-b", [0.750, 0.752, 0.7541])  # the claimed order
    assert status().status == "reproduced"


def test_the_interval_is_corrected_for_all_comparisons_that_are_planned(repository, status, monkeypatch):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    repository.run("fake-b", [0.7705, 0.7719, 0.7741])  # -1.02 points: t(2) = -57.6, p = 0.000301
    monkeypatch.setattr(Ledger, "planned", 160)
    assert status().status == "contradicted"
    monkeypatch.setattr(Ledger, "planned", 170)
    assert status().status == "reproduced"


def test_planned_comparisons_are_the_claimed_scores_with_a_number_of_the_baseline(repository, evidence):
    assert evidence().ledger.planned == 1
    repository.edit(
        "Baseline: {name: null, Metrics: {}}", "Baseline: {name: null, Metrics: {top1: 70.0, parameters: 1}}"
    )
    assert evidence().ledger.planned == 2


@pytest.mark.parametrize(
    "change", [{"selection": "best-test-epoch"}, {"variant": "as_released"}, {"first": 7}, {"config_sha256": "old"}]
)
def test_evidence_of_another_kind_never_counts(repository, status, change):
    repository.run("fake-a", [0.760, 0.762, 0.764], **change)
    assert status().status == "not-run"


def test_demo_evidence_gives_demo_and_lite_evidence_nothing(repository, status):
    repository.run("fake-a", [0.762] * 3, scale="lite")
    assert status().status == "not-run"
    repository.run("fake-a", [0.5], scale="demo")
    assert status().status == "demo"


def test_undefined_value_of_one_seed_gives_no_status(repository, status):
    repository.run("fake-a", [0.760, 0.762, 0.764, None])
    assert status().status == "not-run"
    assert "undefined for seed 3" in status().reason


def test_unknown_number_is_not_run_without_evidence_and_blocked_with_it(repository, status):
    repository.edit("{top1: 76.20}", "{top1: null}")
    assert (status().status, status().why) == ("not-run", "needs a week")
    repository.run("fake-a", [0.762] * 3)
    assert (status().status, status().why) == ("blocked", "the paper's number is not known")


def test_blocked_stays_until_there_is_evidence(repository, status):
    repository.edit("Status: not-run", "Status: blocked")
    assert status().status == "blocked"
    repository.run("fake-a", [0.762] * 3)
    assert status().status == "reproduced"


def test_parameters_are_counted_on_the_spot(repository, status, monkeypatch):
    repository.edit("{top1: 76.20}", "{top1: 76.20, parameters: 7.0e6}")
    repository.run("fake-a", [0.762] * 3)
    for measured, agreed in ((6.95e6, True), (6.5e6, False)):
        counts = {"parameters": measured, "flops": 0}
        monkeypatch.setattr(Paper, "count", lambda paper, cfg, counts=counts: counts)
        derived = status()
        assert derived.counts == {"parameters": (measured, agreed)}
        # The status is that of the scores; a count that is another network's is said beside it.
        assert derived.status == "reproduced"
        assert ("parameters differs" in derived.reason) is not agreed


def test_a_claim_of_several_settings_shows_them_beside_its_own(repository, status):
    repository.edit(
        "Config: fake/configs/experiment/fake-a.yaml",
        "Config: [fake/configs/experiment/fake-a.yaml, fake/configs/experiment/fake-b.yaml]",
    )
    repository.run("fake-b", [0.70, 0.71, 0.72])
    assert status().settings["fake-b"]["top1"].mean == pytest.approx(71)
    assert status().status == "not-run"  # of its own setting


def test_records_outside_the_repository_count_for_what_is_printed_and_are_named_by_their_whole_path(
    repository, evidence, tmp_path_factory
):
    repository.run("fake-a", [0.76, 0.761, 0.762])
    elsewhere = tmp_path_factory.mktemp("results") / "fake"
    (repository.root / "fake/results").rename(elsewhere)
    now = evidence()
    now.results, now.overrides = elsewhere, (f"paths.results={elsewhere}",)
    derived = Derived(now, now.ledger.Models[0])
    assert derived.n == 3 and derived.status == "reproduced"
    assert derived.evidence[0]["File"] == str(elsewhere / "full/fake-a/seed0.json")


def test_a_training_that_diverged_never_counts_and_skipped_steps_are_said(repository, status):
    scores = {"top1": 0.762, "steps_trained": 100.0}
    repository.run("fake-a", [scores | {"skipped_steps": skipped} for skipped in (0.0, 3.0, 6.0)])
    assert (status().status, status().n) == ("not-run", 2)
    assert "2 of 3 runs skipped steps (seed 1: 3, seed 2: 6); the training of seed 2 diverged" in status().reason
    repository.run("fake-a", [scores | {"skipped_steps": 5.0}], first=2)
    assert status().status == "reproduced" and "diverged" not in status().reason


def test_two_skipped_steps_of_an_unknown_number_are_too_many(repository, status):
    repository.run("fake-a", [{"top1": 0.762, "skipped_steps": skipped} for skipped in (0.0, 1.0, 2.0)])
    assert status().n == 2


BEST_BESIDE = {"config": {"output": {"validate_every": 1}}}


def best(values, gain: float = 0.004, of: str = "") -> list[dict]:
    return [{"top1": v, f"top1{of}": v, f"top1{of}_best": v + gain} for v in values]


@pytest.mark.parametrize(("selection", "of"), [("best-test-epoch", ""), ("best-ema-epoch", "_average")])
def test_a_claim_of_the_best_epoch_is_compared_with_the_best_and_shows_the_last(repository, status, selection, of):
    repository.edit("Selection: last-epoch", f"Selection: {selection}")
    repository.run("fake-a", best([0.757, 0.758, 0.759], of=of), **BEST_BESIDE)  # 75.8 is below 76.2 by more than 0.3
    derived = status()
    assert derived.status == "reproduced" and derived.n == 3 and "does not count" not in derived.reason
    assert derived.measured["top1"].mean == pytest.approx(76.2)
    assert derived.results[0]["Metrics"] == {"top1": 76.2, "top1_last": 75.8}


def test_a_claim_of_the_last_epoch_is_not_compared_with_the_best(repository, status):
    repository.run("fake-a", best([0.757, 0.758, 0.759]), **BEST_BESIDE)
    assert status().status == "below" and status().results[0]["Metrics"] == {"top1": 75.8}


@pytest.mark.parametrize("every", [None, 5])
def test_the_best_of_some_epochs_is_not_the_best_of_all(repository, status, every):
    repository.edit("Selection: last-epoch", "Selection: best-test-epoch")
    repository.run("fake-a", best([0.757, 0.758, 0.759]), config={"output": {"validate_every": every}})
    assert status().n == 0 and "evidence with selection last-epoch does not count" in status().reason


def test_the_baseline_is_compared_by_the_same_choice_of_an_epoch(repository, status):
    repository.edit("Selection: last-epoch", "Selection: best-test-epoch")
    repository.run("fake-a", best([0.757, 0.758, 0.759]), **BEST_BESIDE)
    repository.run("fake-b", best([0.757, 0.758, 0.759], gain=0.001), **BEST_BESIDE)
    assert status().gains["top1"].mean == pytest.approx(0.3)


def test_what_has_no_score_at_the_chosen_epoch_is_left_out_of_the_view(repository, status):
    repository.edit("Selection: last-epoch", "Selection: best-test-epoch")
    scores = {"top1": 0.757, "top1_best": 0.758, "best_epoch": 7.0, "loss": 1.0, "top1_average": 0.7}
    repository.run("fake-a", [{**scores, "top1_average_best": 0.9}], **BEST_BESIDE)
    (record,) = status().ours.fresh.values()
    assert record.metrics["top1"] == 0.758 and record.metrics["top1_last"] == 0.757
    assert "loss" not in record.metrics and record.metrics["top1_average"] == 0.7
