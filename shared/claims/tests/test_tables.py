"""The cells of the tables."""

import pytest

from shared.claims.status import derive
from shared.claims.tables import claims_table, measured_tables, own_tables
from shared.errors import UserError


def test_lite_table_shows_means_paired_differences_and_their_number(repository, evidence):
    repository.run("lite-plain", [{"oa": v, "aa": 0.5} for v in (0.90, 0.91, 0.92)], scale="lite")
    extra = [
        {"oa": v, "rho": r, "classes_scored": "4 of 5 classes"} for v, r in ((0.91, 0.5), (0.93, 0.7), (0.93, None))
    ]
    repository.run("lite-new", extra, scale="lite", dirty=True)
    (table,) = own_tables(evidence(), "lite")
    assert table.title == "Digits"
    assert table.columns[1:4] == ["OA %", "AA %", "rho (uncertainty, mixing)"]
    assert "OA %: difference [95 %]" in table.columns
    plain, new = table.rows
    assert plain == ["plain", "91.00 ± 1.00", "50.00 ± 0.00", "–", "–", "–", "3", "30"]
    # differences 1, 2, 1 points: mean 4/3, t(2) = 4.303, standard error 1/3
    assert new[1:] == [
        "92.33 ± 1.15",
        "–",
        "0.600 ± 0.141 (undefined for 1 seeds)",
        "4 of 5 classes",
        "+1.33 [-0.10, 2.77] vs plain: no evidence",
        "3",
        "30",
    ]
    notes = " ".join(table.notes)
    assert "planned comparisons: 1, still open: 0" in notes and "not corrected" in notes
    assert "corrects for all 1: 0." in notes
    assert "a processor, 2 cores (6 runs)" in notes
    assert "0123456 (3 runs); 0123456 with uncommitted changes (3 runs)" in notes


def test_difference_that_survives_the_correction_is_marked(repository, evidence):
    repository.run("lite-plain", [{"oa": v, "aa": 0.5} for v in (0.90, 0.91, 0.92)], scale="lite")
    repository.run("lite-new", [{"oa": v, "rho": 0.5} for v in (0.950, 0.961, 0.970)], scale="lite")
    (table,) = own_tables(evidence(), "lite")
    # differences 5.0, 5.1, 5.0 points: t(2) = 151, p = 4e-5
    assert "+5.03 [4.89, 5.18] † vs plain" in table.rows[1]
    assert "corrects for all 1: 1." in " ".join(table.notes)


def test_every_compared_metric_has_a_column_of_differences(repository, evidence):
    repository.edit("Extra: [rho, classes_scored]}", "Metrics: [oa, aa], Compared: [oa, aa]}")
    repository.run("lite-plain", [{"oa": v, "aa": 0.5} for v in (0.90, 0.91, 0.92)], scale="lite")
    repository.run("lite-new", [{"oa": 0.9, "aa": v} for v in (0.61, 0.63, 0.62)], scale="lite")
    (table,) = own_tables(evidence(), "lite")
    assert table.columns[3:] == ["OA %: difference [95 %]", "AA %: difference [95 %]", "seeds", "seconds"]
    plain, new = table.rows
    assert plain[3:5] == ["–", "–"] and all(len(row) == len(table.columns) for row in table.rows)
    # 0, -1, -2 points: t(2) = 4.303, standard error 1/sqrt(3); 11, 13, 12 points
    assert new[3:5] == ["-1.00 [-3.48, 1.48] vs plain: no evidence", "+12.00 [9.52, 14.48] † vs plain"]
    assert "planned comparisons: 2, still open: 0" in " ".join(table.notes)


def test_a_metric_that_is_not_shown_cannot_be_compared(repository, evidence):
    repository.edit("Extra: [rho, classes_scored]}", "Compared: [aa]}")
    with pytest.raises(UserError, match="lite-new compares 'aa', which is none of its Metrics"):
        own_tables(evidence(), "lite")


def test_rows_without_evidence_say_not_run(repository, evidence):
    (table,) = own_tables(evidence(), "lite")
    assert [row[1] for row in table.rows] == ["not run", "not run"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_skipped_steps_stand_in_the_notes_and_a_training_that_diverged_in_no_mean(repository, evidence):
    counts = [(0.90, 0.0), (0.91, 2.0), (0.10, 39.0)]
    runs = [{"oa": v, "aa": 0.5, "skipped_steps": skipped, "steps_trained": 44.0} for v, skipped in counts]
    repository.run("lite-plain", runs, scale="lite")
    repository.run("lite-new", [{"oa": 0.1, "rho": 0.5, "skipped_steps": 9.0, "steps_trained": 44.0}], scale="lite")
    (table,) = own_tables(evidence(), "lite")
    plain, new = table.rows
    assert plain[1] == "90.50 ± 0.71" and plain[-2] == "2" and new[1] == "diverged"
    notes = " ".join(table.notes)
    assert "plain, 2 of 3 runs skipped steps (seed 1: 2, seed 2: 39); new, 1 of 1 runs skipped steps" in notes
    assert "Diverged, and in no mean: plain, seed 2; new, seed 0." in notes


def test_nothing_is_said_of_skipped_steps_where_there_are_none(repository, evidence):
    repository.run("lite-plain", [{"oa": 0.9, "aa": 0.5, "skipped_steps": 0.0}], scale="lite")
    (table,) = own_tables(evidence(), "lite")
    assert not any("skipped" in note or "Diverged" in note for note in table.notes)


def test_comparisons_are_not_spoken_of_where_none_is_planned(repository, evidence):
    repository.edit(", Baseline: lite-plain", "")
    repository.run("lite-plain", [{"oa": v, "aa": 0.5} for v in (0.90, 0.91)], scale="lite")
    (table,) = own_tables(evidence(), "lite")
    assert "Mean ± standard deviation over seeds." in table.notes
    assert not any("omparisons" in note or "ifferences" in note for note in table.notes)
    repository.edit("Baseline: {name: theirs, Metrics: {top1: 75.8}}", "Baseline: {name: theirs, Metrics: {}}")
    assert claims_table(derive(evidence())).notes == []


def test_the_table_of_claims_says_how_many_planned_comparisons_are_open(repository, evidence):
    assert "planned comparisons: 1, still open: 1" in claims_table(derive(evidence())).notes[0]
    repository.run("fake-a", [0.760, 0.762, 0.764])
    repository.run("fake-b", [0.750, 0.752])
    assert "planned comparisons: 1, still open: 1" in claims_table(derive(evidence())).notes[0]
    repository.run("fake-b", [0.750, 0.752, 0.754])
    assert "planned comparisons: 1, still open: 0" in claims_table(derive(evidence())).notes[0]


def test_no_difference_stands_without_its_interval(repository, evidence):
    repository.run("lite-plain", [{"oa": 0.90, "aa": 0.5}], scale="lite")
    repository.run("lite-new", [{"oa": 0.95, "rho": 0.5}], scale="lite")
    (table,) = own_tables(evidence(), "lite")
    assert table.rows[1][table.columns.index("OA %: difference [95 %]")] == "–"
    repository.run("fake-a", [0.760])
    repository.run("fake-b", [0.750])
    assert "less the baseline" not in claims_table(derive(evidence())).rows[0][3]
    for row in ("fake-a", "fake-b"):
        repository.run(row, [0.760, 0.762])
    assert "less the baseline: +0.00 [0.00, 0.00]" in claims_table(derive(evidence())).rows[0][3]


def test_the_best_epoch_never_stands_alone(repository, evidence):
    repository.edit("Selection: last-epoch", "Selection: best-test-epoch")
    repository.run("fake-a", [{"top1": 0.75, "top1_best": 0.76}], config={"output": {"validate_every": 1}})
    lines = claims_table(derive(evidence())).rows[0][3].split("<br>")
    assert lines == ["top-1 %, best-test-epoch: 76.00", "top-1 %, last epoch: 75.00"]
    repository.run("fake-a", [{"top1": 0.75, "top1_last": 0.74}], selection="best-test-epoch")  # chose its weights so
    lines = claims_table(derive(evidence())).rows[0][3].split("<br>")
    assert lines == ["top-1 %, best-test-epoch: 75.00", "top-1 %, last epoch: 74.00"]
    repository.run("lite-plain", [{"oa": v, "oa_best": v + 0.01, "aa": 0.5} for v in (0.90, 0.92)], scale="lite")
    (table,) = own_tables(evidence(), "lite")
    assert table.rows[0][1] == "91.00 ± 1.41<br>best scored epoch: 92.00 ± 1.41"


def test_a_row_that_is_not_for_the_readme_stands_in_the_results_alone(repository, evidence):
    repository.run("lite-plain", [{"oa": 0.9, "aa": 0.5}], scale="lite")
    repository.run("lite-new", [{"oa": 0.9, "rho": 0.5}], scale="lite")
    assert [row[0] for row in measured_tables(evidence())[-1].rows] == ["plain", "new"]
    repository.edit("Extra: [rho, classes_scored]}", "Readme: false}")
    assert [row[0] for row in measured_tables(evidence())[-1].rows] == ["plain"]
    assert [row[0] for row in own_tables(evidence(), "lite")[0].rows] == ["plain", "new"]
