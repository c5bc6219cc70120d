"""A row name means one configuration, across papers too: numbers under one name can be compared."""

import json
from pathlib import Path

from commands.reproduce import plan
from shared.claims.ledger import load_ledger
from shared.claims.protocol import load_paper

ROOT = Path(__file__).resolve().parents[1]
HASHES = json.loads(Path(__file__).with_name("config_hashes.json").read_text(encoding="utf-8"))


def names_of_several_hashes(hashes: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return row -> {paper: hash} of the rows that papers configure differently."""
    by_row: dict[str, dict[str, str]] = {}
    for paper, rows in hashes.items():
        for row, sha256 in rows.items():
            by_row.setdefault(row, {})[paper] = sha256
    return {row: papers for row, papers in by_row.items() if len(set(papers.values())) > 1}


def test_a_row_name_means_one_configuration_in_all_papers():
    # tests/test_config_hashes.py compares the file with the rows, all of them, so the file stands for them.
    clashes = names_of_several_hashes(HASHES)
    assert not clashes, f"rename the row in one of the papers, with Formerly where it has records: {clashes}"


def test_a_name_with_two_hashes_is_noticed():
    rows = {"a": {"x": "1", "y": "2"}, "b": {"x": "1", "y": "3"}}
    assert names_of_several_hashes(rows) == {"y": {"a": "2", "b": "3"}}


def test_records_that_say_a_former_name_are_evidence_of_the_renamed_row():
    paper = load_paper(ROOT, "v2m")
    renamed = [row.Row for row in load_ledger(ROOT, "v2m").Lite if row.Formerly]
    assert renamed
    assert plan(paper, "lite", renamed, [0, 1, 2], []) == []
    # and nothing else is: a seed that has no record is run
    assert [(job.row, job.seed) for job in plan(paper, "lite", renamed[:1], [3], [])] == [(renamed[0], 3)]
