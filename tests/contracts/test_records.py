"""A run's record: what it holds, and that it is there only when the run is whole."""

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

from shared.environment import lock_sha256, repository_root
from shared.records import read_record
from shared.testing.applications import call_application
from shared.training.config import evidence_path, hash_of, run_folder
from tests.contracts.papers import of_papers


def git(*arguments: str) -> str:
    command = ["git", "-C", str(repository_root()), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def train(contract, tmp_path, *more: str):
    return call_application(contract.paper, "train", *contract.overrides(tmp_path, *more))


@of_papers()
def test_a_record_holds_what_was_run_on_what_and_no_path_of_the_machine(contract, tmp_path):
    assert train(contract, tmp_path).code == 0
    cfg = contract.config(tmp_path)
    record, text = read_record(evidence_path(cfg)), evidence_path(cfg).read_text()
    assert (record.paper, record.row, record.scale) == (contract.paper.name, contract.row, "demo")
    assert (record.seed, record.selection, record.variant) == (0, cfg.selection, cfg.variant)
    assert (record.config_sha256, record.manifest_sha256) == hash_of(cfg)
    assert record.commit == git("rev-parse", "HEAD") and isinstance(record.dirty, bool)
    assert record.lock_sha256 == lock_sha256(contract.paper.root)
    assert record.n_test > 1 and record.metrics["skipped_steps"] == 0 and record.metrics["resumed"] == 0
    assert record.wall_seconds > 0 and record.peak_memory_bytes > 2**20
    assert {"python", "torch", "lightning", "numpy"} <= set(record.versions)
    assert record.hardware["cores"] >= 1 and record.started_at.endswith("+00:00")
    assert "paths" not in record.config and record.config["optim"]["precision"] == "32-true"
    for place in (tmp_path, repository_root(), Path.home(), Path.cwd()):
        assert str(place) not in text
    assert os.environ.get("HOSTNAME", "no host") not in text
    assert json.loads(text)["metrics"].keys() == record.metrics.keys()


@of_papers()
def test_a_record_is_whole_or_absent_and_stale_evidence_is_replaced_by_a_whole_run_alone(
    contract, tmp_path, monkeypatch
):
    module = importlib.import_module(f"{contract.paper.name}.train")
    run, cfg, path = module.run, contract.config(tmp_path), evidence_path(contract.config(tmp_path))
    assert train(contract, tmp_path, "optim.lr=0.0007").code == 0
    stale = path.read_bytes()
    seen = []

    def failing(cfg, folder):
        seen.append(path.read_bytes())
        run(cfg, folder)
        raise RuntimeError("behind the training")

    monkeypatch.setattr(module, "run", failing)
    ended = train(contract, tmp_path)
    assert ended.code == 1 and "RuntimeError: behind the training" in ended.err
    assert seen == [stale] and path.read_bytes() == stale
    assert (run_folder(cfg) / "failed.txt").read_text().startswith("RuntimeError: behind the training\n")
    monkeypatch.setattr(module, "run", run)
    with monkeypatch.context() as patch:  # the machine dies before the record has its name
        replace = os.replace

        def dying(source, target):
            if Path(target) == path:
                raise OSError("no more")
            return replace(source, target)

        patch.setattr(os, "replace", dying)
        assert train(contract, tmp_path).code == 1
        assert path.read_bytes() == stale and [file.name for file in path.parent.iterdir()] == [path.name]
    ended = train(contract, tmp_path)
    assert ended.code == 0, ended.err
    record = read_record(path)
    assert record.config_sha256 == hash_of(cfg)[0] != json.loads(stale)["config_sha256"]
    assert record.metrics["resumed"] == 1, "the training that came before the failure was kept"
    assert not (run_folder(cfg) / "failed.txt").exists()


@of_papers(twins=False)
def test_a_training_that_diverged_leaves_one_sentence_and_no_record(contract, tmp_path, monkeypatch):
    monkeypatch.setattr("shared.training.guard.any_rank", lambda flag: True)  # no step is finite
    ended = train(contract, tmp_path)
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert re.search(r"the training diverged: (\d+) of \1 steps.*; there is no good checkpoint", ended.err), ended.err
    assert not evidence_path(contract.config(tmp_path)).exists() and not list(tmp_path.rglob("last.ckpt"))
