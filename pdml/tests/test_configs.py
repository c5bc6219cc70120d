"""Every experiment of PDML composes and stands in the ledger; the benchmark rows run when their files are there."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pdml.scenes import load_scene
from shared.claims.compose import compose, config_folder, hash_of, repository_root, row_config, row_overrides
from shared.claims.ledger import load_ledger
from shared.claims.reproduce import rows_of
from shared.data.keyed import keyed_bits
from shared.data.matlab import read_mat
from shared.errors import UserError
from shared.training.application import evidence_path, has_evidence, run_row
from shared.training.record import read_record

FILES = sorted(path.stem for path in (config_folder("pdml") / "experiment").glob("*.yaml"))
LEDGER = load_ledger(repository_root(), "pdml")
SCALE_OF = {row.Row: s for s in ("demo", "lite", "full") for row in getattr(LEDGER, s.capitalize())}
SCALE_OF |= {model.Claim.Row: "full" for model in LEDGER.Models}
OWN = [*LEDGER.Lite, *LEDGER.Demo, *LEDGER.Full]
LARGE = ("pdml-pavia-university-up", "pdml-ksc", "pdml-houston-2013")
SMALL = "pdml-indian-pines-in"


def composed(row: str):
    return row_config("pdml", row, 0)


def test_ledger_and_experiment_files_hold_the_same_rows():
    assert sorted(SCALE_OF) == FILES
    assert {row for scale in ("demo", "lite", "full") for row in rows_of("pdml", scale)} == set(FILES)


@pytest.mark.parametrize("row", FILES)
def test_experiment_composes_to_its_own_row_at_the_scale_of_the_ledger(row):
    cfg = composed(row)
    assert (cfg.row, cfg.paper, cfg.scale.name) == (row, "pdml", SCALE_OF[row])


def test_seed_reaches_the_config():
    assert composed(FILES[0]).seed == 0 and row_config("pdml", FILES[0], 3).seed == 3
    assert compose("pdml", row_overrides("pdml", FILES[0], 4, [])).seed == 4


@pytest.mark.parametrize("model", LEDGER.Models, ids=lambda model: model.Claim.Row)
def test_claimed_row_is_run_as_the_ledger_says(model):
    cfg, claim = composed(model.Claim.Row), model.Claim
    assert (cfg.selection, cfg.variant) == (claim.Selection, claim.Variant)
    assert list(cfg.launcher.seeds) == claim.Seeds


@pytest.mark.parametrize("row, baseline", [(row.Row, other) for row in OWN for other in row.Baseline])
def test_row_differs_from_its_baseline_in_network_and_method_only(row, baseline):
    one, other = composed(row), composed(baseline)
    differing = {key for key in one if one[key] != other[key]}
    assert differing <= {"row", "method", "model"} and "method" in differing
    assert "model" not in differing or row.endswith("published")


def test_no_two_rows_of_a_scale_are_the_same_measurement():
    hashes = {row: hash_of(composed(row))[0] for row in FILES}
    assert len(set(hashes.values())) == len(hashes)


@pytest.mark.parametrize("key", ["optim.lrr", "data.split.blocks", "nothing", "method.model.widht"])
def test_unknown_key_is_named_in_one_sentence(key):
    with pytest.raises(UserError, match=key.split(".")[-1]) as error:
        compose("pdml", [f"{key}=1"])
    assert "\n" not in str(error.value)


def test_value_of_the_wrong_type_is_named():
    with pytest.raises(UserError, match="'many'.*scale.steps=many|scale.steps=many.*'many'"):
        compose("pdml", ["scale.steps=many"])


def test_unknown_row_is_named_with_the_nearest_ones():
    with pytest.raises(UserError, match="'jasper-random-ssrn-pdm'.*did you mean.*jasper-random-ssrn-pdml"):
        row_overrides("pdml", "jasper-random-ssrn-pdm", 0, [])


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
    cfg = compose("pdml", row_overrides("pdml", row, 0, [f"paths.data_root={root}", *overrides]))
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
    assert run_row(cfg) == "measured" and has_evidence(cfg)
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
    found = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    assert {
        "classification.png",
        "uncertainty.png",
        "confusion.png",
        "last.ckpt",
        "curves/start0/metrics.csv",
    } <= found
    assert run_row(cfg) == "measured already"
