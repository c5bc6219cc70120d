"""Composition of rows: cached, hashed by what can change a number, and one sentence for what is wrong."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.claims.compose import (
    compose,
    config_folder,
    expected_hash,
    hash_of,
    papers,
    quoted,
    row_config,
    row_overrides,
)
from shared.errors import UserError

ROW = "synthetic-random-ssrn-plain"


@pytest.mark.parametrize("row, seed", [(ROW, 0), (ROW, 3), ("jasper-disjoint-ssrn-pdml", 4)])
def test_copy_of_a_cached_row_has_the_hash_of_a_fresh_composition(row, seed):
    row_config("pdml", row, 1)  # the cache holds the row by now, with other seeds asked before
    fresh = compose("pdml", row_overrides("pdml", row, seed, []))
    assert row_config("pdml", row, seed) == fresh
    assert expected_hash("pdml", row, seed) == hash_of(fresh)[0]


def test_what_a_caller_does_to_its_config_does_not_reach_the_cache():
    row_config("pdml", ROW, 0).optim.lr = 7.0
    assert row_config("pdml", ROW, 0).optim.lr != 7.0


def test_hash_covers_what_can_change_a_number_and_nothing_else():
    neutral = "paths.data_root=x paths.runs=y logging.csv=false trainer.workers=2 output.maps=false".split()
    same = expected_hash("pdml", ROW, 0)
    assert expected_hash("pdml", ROW, 0, neutral) == same
    changes = ("optim.lr=1", "method=pdml", "scale.steps=61", "data.split.amount=6")
    changed = {expected_hash("pdml", ROW, 0, [change]) for change in changes} | {
        expected_hash("pdml", ROW, 1)
    }
    assert len(changed) == len(changes) + 1 and same not in changed


def test_hash_covers_the_content_of_the_manifest_and_not_where_the_data_lie(monkeypatch):
    cfg = row_config("pdml", "jasper-random-ssrn-plain", 0, ["paths.data_root=x"])
    before = hash_of(cfg)
    assert before == hash_of(row_config("pdml", "jasper-random-ssrn-plain", 0))
    monkeypatch.setattr("shared.claims.compose._manifest_digest", lambda name: f"another {name}")
    assert hash_of(cfg)[0] != before[0] and hash_of(cfg)[1] == "another jasper_ridge"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=("Cc",)), max_size=12))
@example("\\")
@example("'\\")
@example("\\'\\\\")
@settings(deadline=None, max_examples=60)
def test_quoted_text_reaches_the_config_as_it_is(text):
    parsed = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert str(parsed.value().text if hasattr(parsed.value(), "text") else parsed.value()) == text


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["modle.name=x"], "'modle'"),
        (["model.nmae=x"], "'nmae'"),
        (["+modle=x"], "key=value"),
        (["~optim.lr"], "key=value"),
        (["patch_size=nine"], "patch_size"),
        (["model=resnet"], "resnet"),
        (["nonsense"], "nonsense"),
        (["seed=1"], "SEEDS="),
    ],
)
def test_unknown_key_or_unfit_value_is_one_sentence(overrides, words):
    with pytest.raises(UserError) as caught:
        row_config("pdml", ROW, 0, overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_row_is_answered_with_the_nearest_ones_and_unknown_paper_with_those_that_are_here():
    with pytest.raises(
        UserError, match="pdml/configs/experiment .* did you mean synthetic-random-ssrn-plain"
    ):
        row_config("pdml", "synthetic-random-ssrn-plane", 0)
    with pytest.raises(UserError, match="choose one of .*pdml"):
        config_folder("pdlm")


@pytest.mark.slow
@pytest.mark.parametrize("paper", papers())
def test_every_experiment_composes_and_calls_itself_as_its_file(paper):
    rows = [path.stem for path in (config_folder(paper) / "experiment").glob("*.yaml")]
    assert rows and [row for row in rows if row_config(paper, row, 0).row != row] == []
