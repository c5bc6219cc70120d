"""The cells of the tables."""

import pytest

from shared.claims.tables import measured_tables, own_tables
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
    assert "Planned comparisons: 1, open: 0" in notes and "not corrected" in notes
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
    assert "Planned comparisons: 2, open: 0" in " ".join(table.notes)


def test_a_metric_that_is_not_shown_cannot_be_compared(repository, evidence):
    repository.edit("Extra: [rho, classes_scored]}", "Compared: [aa]}")
    with pytest.raises(UserError, match="lite-new compares 'aa', which is none of its Metrics"):
        own_tables(evidence(), "lite")


def test_rows_without_evidence_say_not_run(repository, evidence):
    (table,) = own_tables(evidence(), "lite")
    assert [row[1] for row in table.rows] == ["not run", "not run"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_row_that_is_not_for_the_readme_stands_in_the_results_alone(repository, evidence):
    repository.run("lite-plain", [{"oa": 0.9, "aa": 0.5}], scale="lite")
    repository.run("lite-new", [{"oa": 0.9, "rho": 0.5}], scale="lite")
    assert [row[0] for row in measured_tables(evidence())[-1].rows] == ["plain", "new"]
    repository.edit("Extra: [rho, classes_scored]}", "Readme: false}")
    assert [row[0] for row in measured_tables(evidence())[-1].rows] == ["plain"]
    assert [row[0] for row in own_tables(evidence(), "lite")[0].rows] == ["plain", "new"]
