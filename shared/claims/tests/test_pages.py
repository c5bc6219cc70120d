"""Tables follow from results; whatever was typed instead makes `make claims` fail."""

import sys
import types

import pytest
import yaml

from shared.claims.tables import Table
from shared.errors import UserError


def test_baseline_may_be_a_row_of_our_own_and_the_gain_over_it_is_shown(repository, status, update_):
    own = "Full:\n  - {Group: g, Metrics: [top1], Rows: [{Row: fake-own, Label: theirs again}]}\n"
    repository.ledger.write_text(repository.ledger.read_text() + own)
    repository.edit("{name: theirs, ", "{name: theirs, Row: fake-own, ")
    repository.run("fake-a", [0.760, 0.762, 0.764])
    assert status().status == "reproduced" and status().gains == {}
    repository.run("fake-own", [0.7705, 0.7719, 0.7741])
    assert status().status == "contradicted"
    repository.mark(repository.results, "full")
    update_()
    assert "top-1 % less fake-own: -1.02 [" in repository.results.read_text()


def test_tables_that_a_paper_computes_itself_are_written_and_checked(repository, update_, monkeypatch):
    interpretations = types.ModuleType("fake.interpretations")
    interpretations.tables = lambda: {"counts": [Table("", ["interpretation", "FLOPs"], [["ours", "1.5"]])]}
    monkeypatch.setitem(sys.modules, "fake", types.ModuleType("fake"))
    monkeypatch.setitem(sys.modules, "fake.interpretations", interpretations)
    update_()
    (repository.root / "fake/interpretations.py").write_text("")
    page = repository.root / "fake/INTERPRETATIONS.md"
    with pytest.raises(UserError, match="INTERPRETATIONS.md does not exist"):
        update_()
    page.write_text("# Interpretations\n")
    with pytest.raises(UserError, match="claims:begin counts"):
        update_()
    repository.mark(page, "counts")
    update_()
    assert "| ours | 1.5 |" in page.read_text()
    repository.edit("| 1.5 |", "| 1.4 |", page)
    with pytest.raises(UserError, match="INTERPRETATIONS.md: the table 'counts' was edited by hand"):
        update_()


def test_only_without_the_extra_is_the_table_that_needs_it_left_as_it_is(repository, update_, monkeypatch):
    interpretations, page = types.ModuleType("fake.interpretations"), repository.root / "fake/INTERPRETATIONS.md"
    counts = {"counts": [Table("", ["interpretation", "FLOPs"], [["ours", "1.5"]])]}
    monkeypatch.setitem(sys.modules, "fake", types.ModuleType("fake"))
    monkeypatch.setitem(sys.modules, "fake.interpretations", interpretations)
    (repository.root / "fake/interpretations.py").write_text("")
    repository.mark(page, "counts")
    repository.mark(page, "dense")

    def given(missing: list[str], tables: dict) -> None:
        monkeypatch.setattr("shared.claims.pages.missing_modules", lambda: missing)
        interpretations.tables = lambda: tables

    given([], counts | {"dense": [Table("", ["row", "M"], [["a", "50.1"]])]})
    update_()
    text = page.read_text()
    given(["mmdet"], counts)
    assert update_(check=True) == [] and page.read_text() == text
    given([], counts)
    with pytest.raises(UserError, match="marker for 'dense', which nothing fills"):
        update_(check=True)
    given(["mmdet"], {"dense": counts["counts"]})
    with pytest.raises(UserError, match="marker for 'counts', which nothing fills"):
        update_(check=True)
    given(["mmdet"], counts)
    repository.edit("| 50.1 |", "| 50.2 |", page)
    with pytest.raises(UserError, match="the table 'dense' was edited by hand"):
        update_(check=True)


def test_update_writes_tables_and_ledger_and_a_second_time_changes_nothing(repository, update_):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    assert len(update_()) == 4
    claim = yaml.safe_load(repository.ledger.read_text())["Models"][0]["Claim"]
    assert claim["Status"] == "reproduced"
    assert [file["File"] for file in claim["Evidence"]] == [f"fake/results/full/fake-a/seed{k}.json" for k in range(3)]
    assert "# a comment that stays" in repository.ledger.read_text()
    assert "{top1: 76.20}  # printed so" in repository.ledger.read_text()
    results, readme = repository.results.read_text(), repository.readme.read_text()
    cells = ("fake-a", "top1: 76.20", "theirs<br>top1: 75.8", "top-1 %: 76.20 ± 0.20 [75.70, 76.70]", "3")
    for page in (results, readme):
        assert f"| {' | '.join(cells)} | reproduced |" in page and "text that stays" in page
    # README.md has what was measured, and one line on the rest.
    assert "| fake-b |" in results and "| fake-b |" not in readme
    assert "1 of 2 claimed rows and 2 of 2 rows of our own were not run" in readme
    summary = (repository.root / "README.md").read_text()
    assert "| [fake](fake/README.md) | 2 | 1 | 1 | 0 of 2 rows | – |" in summary
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
        "Metrics: {top1: 75.8}\n      Baseline: {name: null", "Metrics: {top1: null}\n      Baseline: {name: null"
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


@pytest.mark.parametrize("file", ["fake/README.md", "fake/RESULTS.md", "README.md"])
def test_hand_edited_table_fails(repository, update_, file):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    update_()
    page = repository.root / file
    repository.edit("| ", "|  ", page)
    fails_and_changes_nothing(repository, update_, rf"{file}: the table .* edited by hand.*git checkout {file}")
    fails_and_changes_nothing(repository, update_, "edited by hand", check=True)


def test_hand_written_table_without_a_stamp_fails(repository, update_):
    repository.edit("begin lite -->\n", "begin lite -->\n| a | 99.9 |\n", repository.results)
    fails_and_changes_nothing(repository, update_, "edited by hand")


def test_missing_or_broken_marker_fails(repository, update_):
    repository.edit("<!-- claims:end lite -->", "", repository.results)
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
    assert repository.results.read_text().count("stale (commit 0123456)") == 2


def test_record_in_the_wrong_place_fails(repository, update_):
    repository.run("fake-a", [0.762])
    folder = repository.root / "fake/results/full/fake-a"
    (folder / "seed1.json").write_text((folder / "seed0.json").read_text())
    fails_and_changes_nothing(repository, update_, "seed1.json says it is .* seed 0")


def test_update_of_one_paper_leaves_the_summary_alone(repository, update_):
    repository.run("fake-a", [0.760, 0.762, 0.764])
    before = (repository.root / "README.md").read_text()
    update_(only=["fake"])
    assert (repository.root / "README.md").read_text() == before
    assert update_() == [repository.root / "README.md"]


def test_summary_shows_the_headline_of_the_ledger_with_its_interval(repository, update_):
    headline = "Headline: {Row: lite-new, Baseline: lite-plain}\n"
    repository.ledger.write_text(headline + repository.ledger.read_text())
    update_()
    assert "| new against plain: not run |" in (repository.root / "README.md").read_text()
    repository.run("lite-plain", [0.90, 0.91, 0.92], "oa", "lite")
    repository.run("lite-new", [0.91, 0.93, 0.93], "oa", "lite")
    update_()
    summary = (repository.root / "README.md").read_text()
    assert "| 2 of 2 rows | Digits: new against plain, OA %: +1.33 [-0.10, 2.77], 3 seeds |" in summary
    repository.edit("Baseline: lite-plain}", "Baseline: lite-none}")
    fails_and_changes_nothing(repository, update_, "Headline names a row that is not in Lite")


def test_records_that_say_a_former_name_are_those_of_the_row(repository, update_):
    repository.run("lite-older", [0.90], "oa", "lite", config_sha256="hash of fake lite-plain 0")
    repository.run("lite-plain", [0.92], "oa", "lite", 1)
    older = repository.root / "fake/results/lite/lite-older/seed0.json"
    older.rename(repository.root / "fake/results/lite/lite-plain/seed0.json")
    fails_and_changes_nothing(repository, update_, "says it is fake/lite/lite-older seed 0")
    repository.edit("{Row: lite-plain,", "{Row: lite-plain, Formerly: lite-older,")
    update_()
    assert "| plain | 91.00 ± 1.41 | undefined | – | 2 |" in repository.readme.read_text()
    assert "1 of 2 rows of our own were not run" in repository.readme.read_text()
