"""Every row's configuration hash is what it was when its evidence was measured: no change of structure loses any."""

import json
from pathlib import Path

import pytest

from shared.claims.compose import row_config, row_names
from shared.claims.protocol import load_paper, paper_names
from shared.training.config import hash_of

ROOT = Path(__file__).resolve().parents[1]
HASHES = json.loads(Path(__file__).with_name("config_hashes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("paper", sorted(HASHES))
def test_every_row_has_the_hash_that_it_had(paper):
    assert {row: hash_of(row_config(paper, row, 0))[0] for row in HASHES[paper]} == HASHES[paper]


@pytest.mark.parametrize("paper", paper_names(ROOT))
def test_every_row_has_its_hash_written_down(paper):
    assert set(row_names(load_paper(ROOT, paper))) == set(HASHES[paper])
