"""Run records are whole or absent, and their hash covers exactly what can change a number."""

import json
import os
import subprocess

import pytest

from shared import environment
from shared.environment import git_state
from shared.errors import UserError
from shared.records import EXCLUDED, RunRecord, config_sha256, read_record, write_record

CONFIG = {
    "model": {"width": 3, "new": {"gate": False}},
    "data": {"manifest_sha256": "abc"},
    "seed": 0,
    "scale": "lite",
    "paths": {"data_root": "/somewhere"},
    "trainer": {"devices": 1, "workers": 2},
}


@pytest.fixture
def record_of():
    """Make a record: changed fields -> record."""
    values = {field: None for field in RunRecord.model_fields} | {
        "paper": "fake",
        "row": "plain",
        "scale": "demo",
        "seed": 0,
        "selection": "last-epoch",
        "variant": "as_written",
        "metrics": {"oa": 0.5},
        "n_test": 100,
        "config": {"model": {"width": 3}},
        "config_sha256": "a" * 64,
        "commit": "0123456789abcdef",
        "dirty": False,
        "hardware": {"cpu": "a processor"},
        "versions": {"python": "3.11"},
        "wall_seconds": 30.0,
        "peak_memory_bytes": 1,
        "started_at": "2024-01-01T00:00:00+00:00",
    }
    return lambda **changes: RunRecord.model_validate(values | changes)


def test_what_was_written_is_read_back(tmp_path, record_of):
    written = record_of(metrics={"oa": 0.5, "per_class": [0.5, None, 1.0], "classes": "2 of 3", "rho": None})
    write_record(tmp_path / "deep" / "seed0.json", written)
    assert read_record(tmp_path / "deep" / "seed0.json") == written
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["seed0.json"]


def test_a_metric_that_is_not_a_number_becomes_null(tmp_path, record_of):
    path = tmp_path / "seed0.json"
    write_record(path, record_of(metrics={"rho": float("nan"), "per_class": [1.0, float("inf")]}))
    assert json.loads(path.read_text())["metrics"] == {"rho": None, "per_class": [1.0, None]}


def test_existing_evidence_is_not_overwritten(tmp_path, record_of):
    path = tmp_path / "seed0.json"
    write_record(path, record_of(commit="first"))
    with pytest.raises(UserError, match="already holds evidence"):
        write_record(path, record_of(commit="second"))
    assert read_record(path).commit == "first"
    write_record(path, record_of(commit="second"), overwrite=True)
    assert read_record(path).commit == "second"


def test_interrupted_write_leaves_what_was_there(tmp_path, record_of, monkeypatch):
    path = tmp_path / "seed0.json"
    write_record(path, record_of(commit="first"))

    def fails(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write_record(path, record_of(commit="second"), overwrite=True)
    assert read_record(path).commit == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: "{}"])
def test_malformed_record_is_one_sentence_with_the_file(tmp_path, record_of, damage):
    path = tmp_path / "seed0.json"
    write_record(path, record_of())
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="seed0.json.*delete it and run the row again"):
        read_record(path)
    with pytest.raises(UserError, match="seed1.json does not exist"):
        read_record(tmp_path / "seed1.json")


def test_unknown_field_in_a_record_is_refused(tmp_path, record_of):
    path = tmp_path / "seed0.json"
    write_record(path, record_of())
    path.write_text(path.read_text().replace('"n_test"', '"n_tests"'))
    with pytest.raises(UserError, match="n_test"):
        read_record(path)


@pytest.mark.parametrize("group", EXCLUDED)
def test_hash_ignores_what_cannot_change_a_number(group):
    assert config_sha256({**CONFIG, group: {"anything": 7}}) == config_sha256(CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"scale": "full"}, {"data": {"manifest_sha256": "abd"}}, {"model": {"width": 4}}, {"new": 1}],
)
def test_hash_follows_what_can_change_a_number(change):
    assert config_sha256({**CONFIG, **change}) != config_sha256(CONFIG)


def test_hash_does_not_depend_on_the_order_of_keys():
    assert config_sha256(dict(reversed(CONFIG.items()))) == config_sha256(CONFIG)


def test_neutral_key_drops_out_only_while_it_is_neutral():
    before = {**CONFIG, "model": {"width": 3}}  # when the key was not there yet
    neutral = {"model.new.gate": False, "never.there": 1}
    assert config_sha256(CONFIG, neutral) == config_sha256(before, neutral) == config_sha256(before)
    for other in (True, 0, None):
        changed = {**CONFIG, "model": {"width": 3, "new": {"gate": other}}}
        assert config_sha256(changed, neutral) != config_sha256(before, neutral)


def test_hashing_leaves_the_config_as_it_was():
    before = json.dumps(CONFIG)
    config_sha256(CONFIG, {"model.new.gate": False})
    assert json.dumps(CONFIG) == before


def test_dirty_means_tracked_files_outside_results(tmp_path, monkeypatch):
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    results = tmp_path / "pdml" / "results" / "lite"
    results.mkdir(parents=True)
    (tmp_path / "code.py").write_text("a = 1\n")
    (results / "seed0.json").write_text("{}")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 40 and not dirty
    (tmp_path / "untracked").write_text("")
    (results / "seed0.json").write_text("{ }")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "code.py").write_text("a = 2\n")
    assert git_state(tmp_path) == (commit, True)


def test_git_state_without_git_is_unknown_and_dirty(tmp_path, monkeypatch):
    assert git_state(tmp_path / "absent") == ("unknown", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == ("unknown", True)


def test_environment_fits_a_record(record_of):
    machine = environment.environment()
    assert record_of(**machine).hardware["cores"] >= 1
    assert {"python", "torch", "numpy", "scikit-learn"} <= set(machine["versions"])
    assert 10 * 2**20 < environment.peak_memory_bytes() < machine["hardware"]["memory_bytes"] * 2


def test_lock_hash_is_that_of_the_file(tmp_path):
    assert environment.lock_sha256(tmp_path) is None
    (tmp_path / "requirements.lock").write_text("")
    assert environment.lock_sha256(tmp_path).startswith("e3b0c44298fc1c14")  # sha256 of nothing
