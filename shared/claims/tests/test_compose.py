"""Composition of rows: cached, hashed by what can change a number, and one sentence for what is wrong."""

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.claims.compose import compose, quoted, row_config, row_names, row_overrides
from shared.claims.evidence import Evidence
from shared.claims.protocol import Paper, load_paper, paper_names
from shared.environment import repository_root
from shared.errors import UserError
from shared.training.config import hash_of

ROOT = repository_root()


@pytest.fixture
def toy(paper):
    return Paper("fake", paper.parent)


@pytest.mark.parametrize("row, seed", [("plain", 0), ("plain", 3), ("lite-plain", 4)])
def test_copy_of_a_cached_row_has_the_hash_of_a_fresh_composition(toy, row, seed):
    row_config(toy, row, 1)  # the cache holds the row by now, with other seeds asked before
    fresh = compose(toy, row_overrides(toy, row, seed, []))
    assert row_config(toy, row, seed) == fresh
    assert Evidence(toy).expected_hash(row, seed) == hash_of(fresh)[0]


def test_what_a_caller_does_to_its_config_does_not_reach_the_cache(config):
    config().optim.lr = 7.0
    assert config().optim.lr != 7.0


def test_hash_covers_what_can_change_a_number_and_nothing_else(config):
    neutral = "paths.data_root=x paths.runs=y logger=default trainer.workers=2 output.checkpoint_every=7".split()
    same = hash_of(config("plain", 0))[0]
    assert hash_of(config("plain", 0, *neutral))[0] == same
    changes = ("optim.lr=1", "model=large", "scale.steps=61", "data.split.amount=6", "gate=true")
    changed = {hash_of(config("plain", 0, change))[0] for change in changes} | {hash_of(config("plain", 1))[0]}
    assert len(changed) == len(changes) + 1 and same not in changed


def test_a_new_key_at_its_neutral_value_changes_no_hash(config, paper):
    same = hash_of(config())[0]
    text = (paper / "configs/neutral.yml").read_text()
    (paper / "configs/neutral.yml").write_text("{}\n")
    assert hash_of(config())[0] != same
    (paper / "configs/neutral.yml").write_text(text)
    assert hash_of(config())[0] == same


def test_hash_covers_the_content_of_the_manifest_and_not_where_the_data_lie(config, monkeypatch):
    cfg = config("lite-plain", 0, "paths.data_root=x")
    before = hash_of(cfg)
    assert before == hash_of(config("lite-plain"))
    monkeypatch.setattr("shared.training.config._manifest_digest", lambda name: f"another {name}")
    assert hash_of(cfg)[0] != before[0] and hash_of(cfg)[1] == "another digits"


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
        (["trainer.device=x"], "'device'"),
        (["+modle=x"], "key=value"),
        (["~optim.lr"], "key=value"),
        (["width=nine"], "width"),
        (["model=resnet"], "resnet"),
        (["nonsense"], "nonsense"),
        (["seed=1"], "SEEDS="),
    ],
)
def test_unknown_key_or_unfit_value_is_one_sentence(config, overrides, words):
    with pytest.raises(UserError) as caught:
        config("plain", 0, *overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_row_is_answered_with_the_nearest_ones_and_unknown_paper_with_those_that_are_here(toy, config):
    with pytest.raises(UserError, match="fake/configs/experiment .* did you mean plain"):
        config("plane")
    with pytest.raises(UserError, match="choose one of fake"):
        load_paper(toy.root, "fkae")


def test_a_row_of_the_ledger_is_what_its_experiment_file_would_be(config, paper, toy):
    cfg = config("new")
    assert (cfg.row, cfg.model.name, cfg.optim.lr, cfg.scale.name) == ("new", "large", 0.2, "demo")
    text = {
        "defaults": [{"override /scale": "demo"}, {"override /model": "large"}],
        "row": "filed",
        "optim": {"lr": 0.2},
    }
    file = paper / "configs/experiment/filed.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\n" + yaml.safe_dump(text))
    assert row_names(toy) == ["filed", "lite-plain", "plain", "new"]
    assert hash_of(config("filed")) == hash_of(cfg)


def test_hydras_help_lists_the_rows_of_the_ledger(start, capsys):
    assert start(["python", "-m", "fake.train", "--info", "searchpath"]) == 0
    assert "ledger://" in capsys.readouterr().out
    assert start(["python", "-m", "fake.train", "--help"]) == 0
    assert "experiment: lite-plain, new, plain" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", paper_names(ROOT))
def test_every_row_composes_and_calls_itself_as_its_name(name):
    paper = load_paper(ROOT, name)
    rows = row_names(paper)
    assert rows and [row for row in rows if row_config(paper, row, 0).row != row] == []
