"""Statuses follow from evidence, tables from results; whatever was typed instead makes `make claims` fail."""

import sys
import types

import pytest
import yaml

from shared.claims.ledger import load_ledger
from shared.claims.render import update
from shared.claims.status import derive
from shared.claims.tables import Table, lite_table
from shared.errors import UserError
from shared.metrics import __main__ as command


@pytest.fixture
def update_(repository, expected_hash):
    return lambda **how: update(repository.root, expected_hash, **how)


@pytest.fixture
def status(repository, expected_hash):
    def derived(index: int = 0):
        ledger = load_ledger(repository.root, "fake")
        return derive(repository.root, "fake", ledger, ledger.Models[index], expected_hash)

    return derived


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


def test_baseline_may_be_a_row_of_our_own_and_the_gain_over_it_is_shown(repository, status, update_):
    full = "Full:\n  - {Row: fake-own, Config: fake/configs/experiment/fake-own.yaml, Group: g, Label: theirs again, "
    text = repository.ledger.read_text() + full + "Baseline: null, Metrics: [top1]}\n"
    repository.ledger.write_text(text)
    repository.edit("{name: theirs, ", "{name: theirs, Row: fake-own, ")
    (repository.root / "fake/configs/experiment/fake-own.yaml").write_text("row: fake-own\n")
    repository.run("fake-a", [0.760, 0.762, 0.764])
    assert status().status == "reproduced" and status().gains == {}
    repository.run("fake-own", [0.7705, 0.7719, 0.7741])
    assert status().status == "contradicted"
    marker = "<!-- claims:begin full -->\n<!-- claims:end full -->\n"
    repository.readme.write_text(repository.readme.read_text() + marker)
    update_()
    assert "top-1 % less fake-own: -1.02 [" in repository.readme.read_text()


@pytest.mark.parametrize(
    "change",
    [{"selection": "best-test-epoch"}, {"variant": "as_released"}, {"first": 7}, {"config_sha256": "old"}],
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
    model = types.ModuleType("fake.model")
    monkeypatch.setitem(sys.modules, "fake", types.ModuleType("fake"))
    monkeypatch.setitem(sys.modules, "fake.model", model)
    with pytest.raises(UserError, match="no count"):
        status()
    for measured, agreed in ((6.95e6, True), (6.5e6, False)):
        model.count = lambda config, measured=measured: {"parameters": measured, "flops": 0}
        assert status().counts == {"parameters": (measured, agreed)}
        # The status is that of the scores; a count that is another network's is said beside it.
        assert status().status == "reproduced"
        assert ("parameters differs" in status().reason) is not agreed


def test_tables_that_a_paper_computes_itself_are_written_and_checked(repository, update_, monkeypatch):
    readings = types.ModuleType("fake.readings")
    readings.tables = lambda: {"readings": [Table("", ["reading", "FLOPs"], [["ours", "1.5"]])]}
    monkeypatch.setitem(sys.modules, "fake", types.ModuleType("fake"))
    monkeypatch.setitem(sys.modules, "fake.readings", readings)
    with pytest.raises(UserError, match="claims:begin readings"):
        update_()
    marker = "<!-- claims:begin readings -->\n<!-- claims:end readings -->\n"
    repository.readme.write_text(repository.readme.read_text() + marker)
    update_()
    assert "| ours | 1.5 |" in repository.readme.read_text()
    repository.readme.write_text(repository.readme.read_text().replace("| 1.5 |", "| 1.4 |"))
    with pytest.raises(UserError, match="edited by hand"):
        update_()


def test_update_writes_tables_and_ledger_and_a_second_time_changes_nothing(repository, update_):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    assert len(update_()) == 3
    claim = yaml.safe_load(repository.ledger.read_text())["Models"][0]["Claim"]
    assert claim["Status"] == "reproduced"
    assert [file["File"] for file in claim["Evidence"]] == [
        f"fake/results/full/fake-a/seed{k}.json" for k in range(3)
    ]
    assert "# a comment that stays" in repository.ledger.read_text()
    assert "{top1: 76.20}  # printed so" in repository.ledger.read_text()
    readme = repository.readme.read_text()
    cells = ("fake-a", "top1: 76.20", "theirs<br>top1: 75.8", "top-1 %: 76.20 ± 0.20 [75.70, 76.70]", "3")
    assert f"| {' | '.join(cells)} | reproduced |" in readme
    assert "text that stays" in readme
    assert "| [fake](fake/README.md) | 1 | reproduced |" in (repository.root / "README.md").read_text()
    assert update_() == [] and update_(check=True) == []


def test_status_and_lists_follow_when_evidence_changes(repository, update_):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    update_()
    repository.run("fake-a", [0.70, 0.70, 0.71, 0.70])
    update_()
    claim = yaml.safe_load(repository.ledger.read_text())["Models"][0]["Claim"]
    assert claim["Status"] == "below" and len(claim["Evidence"]) == 4
    assert update_() == []


def test_values_written_as_blocks_are_replaced_whole(repository, update_):
    block = "Evidence:\n        - File: a\n          SHA256: b\n        - {File: c, SHA256: d}\n"
    repository.edit("Evidence: []\n", block)
    repository.edit("Results: []", "Results:\n    - {Task: a, Dataset: b, Metrics: {}, Seeds: []}")
    update_()
    models = yaml.safe_load(repository.ledger.read_text())["Models"]
    assert models[0]["Claim"]["Evidence"] == [] and models[0]["Results"] == []
    assert models[1]["Name"] == "fake-base"


def test_unknown_numbers_write_a_why_where_there_was_none(repository, update_):
    repository.edit(
        "Metrics: {top1: 75.8}\n      Baseline: {name: null",
        "Metrics: {top1: null}\n      Baseline: {name: null",
    )
    repository.run("fake-b", [0.7])
    update_()
    claim = yaml.safe_load(repository.ledger.read_text())["Models"][1]["Claim"]
    assert (claim["Status"], claim["Why"]) == ("blocked", "the paper's number is not known")
    assert update_() == []


def fails_and_changes_nothing(repository, update_, match: str, **how) -> None:
    before = repository.texts()
    with pytest.raises(UserError, match=match):
        update_(**how)
    assert repository.texts() == before


@pytest.mark.parametrize("file", ["fake/README.md", "README.md"])
def test_hand_edited_table_fails(repository, update_, file):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    update_()
    repository.edit("reproduced", "REPRODUCED", repository.root / file)
    fails_and_changes_nothing(
        repository, update_, rf"{file}: the table .* edited by hand.*git checkout {file}"
    )
    fails_and_changes_nothing(repository, update_, "edited by hand", check=True)


def test_hand_written_table_without_a_stamp_fails(repository, update_):
    repository.edit("begin lite -->\n", "begin lite -->\n| a | 99.9 |\n", repository.readme)
    fails_and_changes_nothing(repository, update_, "edited by hand")


def test_missing_or_broken_marker_fails(repository, update_):
    repository.edit("<!-- claims:end lite -->", "", repository.readme)
    fails_and_changes_nothing(repository, update_, "claims:begin lite")


def test_table_that_is_out_of_date_fails_the_check_and_is_rewritten_otherwise(repository, update_):
    update_()
    repository.run("fake-a", [0.760, 0.762, 0.764])
    fails_and_changes_nothing(repository, update_, "does not show the present evidence", check=True)
    assert repository.readme in update_()


@pytest.mark.parametrize("typed", ["reproduced", "below", "above", "contradicted", "demo"])
def test_status_without_evidence_fails(repository, update_, typed):
    repository.edit("Status: not-run", f"Status: {typed}")
    fails_and_changes_nothing(repository, update_, f"status {typed} of row fake-a has no evidence")


def test_status_that_lost_its_evidence_fails(repository, update_):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    update_()
    (repository.root / "fake/results/full/fake-a/seed1.json").unlink()
    fails_and_changes_nothing(repository, update_, "status reproduced of row fake-a has no evidence")


def test_status_on_stale_evidence_fails(repository, update_):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    update_()
    repository.run("fake-a", [0.760, 0.762, 0.764], config_sha256="of another config")
    fails_and_changes_nothing(repository, update_, "status reproduced of row fake-a rests on stale evidence")


@pytest.mark.parametrize("typed", ["below", "not-run"])
def test_status_against_its_evidence_fails(repository, update_, typed):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    update_()
    repository.edit("Status: reproduced", f"Status: {typed}")
    fails_and_changes_nothing(repository, update_, "does not follow from its evidence")


def test_stale_evidence_is_shown_with_its_commit(repository, update_):
    repository.run("fake-a", [0.762], config_sha256="old")
    repository.run("lite-plain", [0.9], "oa", "lite", config_sha256="old")
    update_()
    assert repository.readme.read_text().count("stale (commit 0123456)") == 2


def test_record_in_the_wrong_place_fails(repository, update_):
    repository.run("fake-a", [0.762])
    folder = repository.root / "fake/results/full/fake-a"
    (folder / "seed1.json").write_text((folder / "seed0.json").read_text())
    fails_and_changes_nothing(repository, update_, "seed1.json says it is .* seed 0")


def test_lite_table_shows_means_paired_differences_and_their_number(repository, expected_hash):
    repository.run("lite-plain", [{"oa": v, "aa": 0.5} for v in (0.90, 0.91, 0.92)], scale="lite")
    extra = [
        {"oa": v, "rho": r, "classes_scored": "4 of 5 classes"}
        for v, r in ((0.91, 0.5), (0.93, 0.7), (0.93, None))
    ]
    repository.run("lite-new", extra, scale="lite", dirty=True)
    (table,) = lite_table("fake", repository.root, expected_hash=expected_hash)
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
    assert "1 paired comparisons" in notes and "not corrected" in notes
    assert "† marks the 0 that stay different" in notes
    assert "a processor, 2 cores (6 runs)" in notes
    assert "0123456 (3 runs); 0123456 with uncommitted changes (3 runs)" in notes


def test_difference_that_survives_the_correction_is_marked(repository, expected_hash):
    repository.run("lite-plain", [{"oa": v, "aa": 0.5} for v in (0.90, 0.91, 0.92)], scale="lite")
    repository.run("lite-new", [{"oa": v, "rho": 0.5} for v in (0.950, 0.961, 0.970)], scale="lite")
    (table,) = lite_table("fake", repository.root, expected_hash=expected_hash)
    # differences 5.0, 5.1, 5.0 points: t(2) = 151, p = 4e-5
    assert "+5.03 [4.89, 5.18] † vs plain" in table.rows[1]
    assert "† marks the 1 that stay different" in " ".join(table.notes)


def test_every_compared_metric_has_a_column_of_differences(repository, expected_hash):
    repository.edit("Metrics: [oa], Extra: [rho, classes_scored]}", "Metrics: [oa, aa], Compared: [oa, aa]}")
    repository.run("lite-plain", [{"oa": v, "aa": 0.5} for v in (0.90, 0.91, 0.92)], scale="lite")
    repository.run("lite-new", [{"oa": 0.9, "aa": v} for v in (0.61, 0.63, 0.62)], scale="lite")
    (table,) = lite_table("fake", repository.root, expected_hash=expected_hash)
    assert table.columns[3:] == ["OA %: difference [95 %]", "AA %: difference [95 %]", "seeds", "seconds"]
    plain, new = table.rows
    assert plain[3:5] == ["–", "–"] and all(len(row) == len(table.columns) for row in table.rows)
    # 0, -1, -2 points: t(2) = 4.303, standard error 1/sqrt(3); 11, 13, 12 points
    assert new[3:5] == ["-1.00 [-3.48, 1.48] vs plain: no evidence", "+12.00 [9.52, 14.48] † vs plain"]
    assert "2 paired comparisons" in " ".join(table.notes)


def test_a_metric_that_is_not_shown_cannot_be_compared(repository, expected_hash):
    repository.edit("Extra: [rho, classes_scored]}", "Compared: [aa]}")
    with pytest.raises(UserError, match="lite-new compares 'aa', which is none of its Metrics"):
        lite_table("fake", repository.root, expected_hash=expected_hash)


def test_rows_without_evidence_say_not_run(repository, expected_hash):
    (table,) = lite_table("fake", repository.root, expected_hash=expected_hash)
    assert [row[1] for row in table.rows] == ["not run", "not run"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_command_ends_with_two_and_one_sentence_on_an_error(repository, expected_hash, monkeypatch, capsys):
    monkeypatch.setattr(command, "default_expected_hash", lambda: expected_hash)
    root = ["--root", str(repository.root)]
    assert command.main([*root, "--check"]) == 2
    assert command.main(root) == 0
    assert command.main([*root, "--check"]) == 0
    assert command.main([*root, "--paper", "fake"]) == 0
    capsys.readouterr()
    assert command.main([*root, "--report"]) == 0
    assert "fake-a" in capsys.readouterr().out
    assert command.main([*root, "--paper", "none"]) == 2
    error = capsys.readouterr().err
    assert "none" in error and error.count("\n") == 1
