"""The figures of detectors and segmenters on a GPU: every command of theirs is one that a row takes."""

import json
from pathlib import Path

import pytest

from commands import dense_evidence
from shared.claims.compose import compose, row_config
from shared.dense.libraries import missing_modules

NAMES = dense_evidence.ROWS.split(",")


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_a_few_steps_on_drawn_images_with_the_images_of_one_device(name, tmp_path):
    paper, row = name.split(":")
    own = row_config(paper, row, 0)
    cfg = compose(paper, dense_evidence.overrides(own, 3, tmp_path))
    assert (cfg.row, cfg.dense.steps, cfg.dense.epochs, cfg.trainer.devices) == (row, 3, None, 1)
    assert cfg.dense.data.source.startswith("shapes") and cfg.dense.base == own.dense.base
    assert cfg.dense.optim.batch_size * own.trainer.devices == own.dense.optim.batch_size
    assert cfg.dense.optim.group in (None, cfg.dense.optim.batch_size)


def test_every_recipe_of_a_claim_is_measured():
    recipes = {row_config(*name.split(":"), 0).dense.base for name in NAMES}
    claimed = {row_config("opera", "opera-det-2x-bs1024-pt150-ap", 0).dense.base}
    assert {base.partition("::")[0] for base in recipes} == {"mmdet", "mmseg"} and len(recipes) == 6
    assert not claimed & recipes  # the same network as in 12 epochs


@pytest.mark.skipif(
    bool(missing_modules()), reason="the extra for detection and segmentation is not here: make setup-dense"
)
def test_without_a_gpu_it_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert dense_evidence.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    bool(missing_modules()), reason="the extra for detection and segmentation is not here: make setup-dense"
)
def test_figures_are_written_row_by_row(tmp_path):
    assert dense_evidence.main(["--cpu", "--out", str(tmp_path), "--rows", "globalmamba:gm-shapes-labels"]) == 0
    (row,) = json.loads(Path(tmp_path / "dense.json").read_text())["rows"]
    assert row["seconds_per_step"] > 0 and row["peak_bytes"] > 0 and row["images"] == 8
