"""PDML's rows: what differs from a baseline; benchmark rows run when their files are there."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy.io import savemat

from pdml.matlab import read_mat
from pdml.model import build_model
from pdml.scenes import load_scene
from pdml.tests.contract import CONTRACT
from shared.claims.compose import repository_root, row_config
from shared.claims.ledger import load_ledger
from shared.data.keyed import keyed_bits
from shared.records import read_record
from shared.testing.applications import call_application
from shared.training.config import evidence_path, has_evidence

LEDGER = load_ledger(repository_root(), "pdml")
LARGE = ("pdml-pavia-university-up", "pdml-ksc", "pdml-houston-2013")
SMALL = "pdml-indian-pines-in"
PAIRS = [(row.Row, baseline) for row in LEDGER.own_rows for baseline in row.Baseline]


@pytest.mark.parametrize("row, baseline", PAIRS)
def test_only_what_a_row_is_named_after_differs_from_its_baseline(row, baseline):
    cfg, other = row_config("pdml", row, 0), row_config("pdml", baseline, 0)
    assert cfg.data == other.data and (cfg.optim, cfg.scale.steps) == (other.optim, other.scale.steps)
    assert (cfg.method != other.method) == (row.removesuffix("-no-dropout") != baseline)
    if row.endswith("published") or cfg.method.name == "svm":
        return  # another network, or none
    own, theirs = OmegaConf.to_container(cfg.model), OmegaConf.to_container(other.model)
    dropout, before = own["backbone"].pop("dropout"), theirs["backbone"].pop("dropout")
    assert own == theirs
    assert dropout == 0 if "no-dropout" in row else dropout == before > 0
    assert (before == 0) == baseline.endswith("no-dropout")


def test_rows_without_dropout_have_none_anywhere():
    rows = [row.Row for row in LEDGER.own_rows if row.Row.endswith("no-dropout")]
    assert len(rows) == 3
    for row in rows:
        layers = [m for m in build_model(row_config("pdml", row, 0), 40, 4).modules() if "Dropout" in type(m).__name__]
        assert layers and all(layer.p == 0 for layer in layers)


def bring(cfg, root: Path) -> bool:
    """Write a random cube and label maps of the config's shape; returns whether the maps are the real ones."""
    files = sorted({file for file in (cfg.labels_file, cfg.train_labels_file) if file})
    real = bool(os.environ.get("DATA_ROOT"))
    line = np.arange(cfg.height * cfg.width).reshape(cfg.height, cfg.width)
    for file in (*files, cfg.cube_file):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if real and file != cfg.cube_file:
            shutil.copyfile(Path(os.environ["DATA_ROOT"]) / file, root / file)
    if not real:
        labels = (line // 7 % (len(cfg.class_names) + 1)).astype(np.uint8)
        first = np.arange(cfg.height)[:, None] % 2 == 0
        maps = {cfg.labels_key or cfg.train_labels_key: labels if cfg.labels_key else labels * first}
        maps |= {} if cfg.labels_key else {cfg.test_labels_key: labels * ~first}
        savemat(root / files[0], maps)
    row = (keyed_bits(9, line[:, :1]) % np.uint64(99)).astype(np.uint8)[..., None]
    band = (keyed_bits(8, np.arange(cfg.bands)) % np.uint64(99)).astype(np.uint8)
    savemat(root / cfg.cube_file, {cfg.cube_key: row + band + (line % 29).astype(np.uint8)[..., None]})
    return real


def with_files(row: str, root: Path, overrides: list[str]):
    """Return the config of a row, its files being under ``root``; made-up label maps need no manifest."""
    cfg = row_config("pdml", row, 0, [f"paths.data_root={root}", *overrides])
    if not bring(cfg.data, root):
        cfg.data.manifest = None
    return cfg


def test_the_benchmark_rows_tested_here_are_those_of_the_ledger():
    assert sorted([SMALL, *LARGE]) == sorted(model.Claim.Row for model in LEDGER.Models)


@pytest.mark.slow
@pytest.mark.parametrize("row", LARGE)
def test_benchmark_row_finds_its_scene_when_the_files_are_there(row, tmp_path):
    cfg = with_files(row, tmp_path, [])
    scene, split = load_scene(cfg.data, cfg.seed, cfg.patch_size, cfg.paths.data_root)
    assert scene.cube.shape == (cfg.data.height, cfg.data.width, cfg.data.bands)
    assert split.classes.all() and not (split.train & split.test).any()
    if cfg.data.manifest:
        assert (tmp_path / ".sha256" / f"{cfg.data.manifest}.json").is_file()


@pytest.mark.slow
def test_benchmark_row_runs_from_files_to_evidence_when_they_are_there(tmp_path):
    # Three by three patches and few steps, but enough for a line of the curves: a thousandth of the cost.
    overrides = ["scale.steps=12", "patch_size=3", "trainer.accelerator=cpu"]
    overrides += [f"paths.results={tmp_path}/results", f"paths.runs={tmp_path}/runs"]
    cfg = with_files(SMALL, tmp_path / "data", overrides)
    line = [f"+experiment={SMALL}", *overrides, f"paths.data_root={tmp_path}/data"]
    line += [] if cfg.data.manifest else ["data.manifest=null"]
    ended = call_application(CONTRACT.paper, "train", *line)
    assert ended.code == 0 and has_evidence(cfg), ended.err
    path = evidence_path(cfg)
    assert path == tmp_path / "results" / "full" / SMALL / "seed0.json"
    record = read_record(path)
    labelled = read_mat(tmp_path / "data" / cfg.data.labels_file, cfg.data.labels_key) > 0
    assert record.row == SMALL and record.n_test + record.metrics["train_pixels"] == labelled.sum()
    assert {"aa", "kappa", "oa_centre", "train_seconds"} <= set(record.metrics)
    assert 0 < record.metrics["oa"] < 1 and record.metrics["oa"] == record.metrics["oa_fused"]
    assert record.metrics["classes_scored"] == "16 of 16" and record.metrics["skipped_steps"] == 0
    assert (record.manifest_sha256 is None) == (cfg.data.manifest is None)
    assert str(tmp_path) not in path.read_text()
    (folder,) = (tmp_path / "runs" / "full" / SMALL).iterdir()
    files = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    assert {
        "classification.png",
        "uncertainty.png",
        "confusion.png",
        "last.ckpt",
        "curves/version_0/metrics.csv",
    } <= files
    before = path.read_bytes()
    assert call_application(CONTRACT.paper, "train", *line).code == 0 and path.read_bytes() == before
