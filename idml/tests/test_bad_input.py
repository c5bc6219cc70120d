"""Bad input of IDML's own that ends a run with one line (the rest: ``contract.py``)."""

import torch

from idml import scoring
from idml.tests.contract import CONTRACT
from idml.tests.test_sets import cub
from shared.data import manifest
from shared.testing.applications import call_application


def error(tmp_path, *overrides: str, row: str | None = None) -> str:
    """Return the line that a run ends with."""
    ended = call_application(CONTRACT.paper, "train", *CONTRACT.overrides(tmp_path, *overrides, row=row))
    assert ended.code == 2 and len(ended.errors) == 1, ended.err
    assert not list(tmp_path.rglob("seed0.json"))
    return ended.err


def test_one_class_alone_in_a_batch_is_one_line(tmp_path):
    words = "a batch of 1 images has one class alone, and contrastive compares classes: raise optim.batch_size"
    assert words in error(tmp_path, "loss=contrastive", "optim.batch_size=1")


def test_embeddings_that_are_not_numbers_are_one_line(tmp_path, monkeypatch):
    def broken(network, images):
        rows = torch.full((len(images), 4), torch.nan)
        return rows, rows[:, 0], rows[:, 0]

    monkeypatch.setattr(scoring, "embed_batch", broken)
    assert "lower optim.lr" in error(tmp_path)


def test_a_corrupt_image_and_annotations_that_do_not_match_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "FOLDER", tmp_path / "manifests")
    manifest.FOLDER.mkdir()
    few = ["data.classes=2", "data.held_out=0", "selection=last-epoch", "optim.batch_size=4"]
    few += ["data.image_size=32"]
    folder = cub(tmp_path / "first")
    (folder / "images/001.bird/1.png").write_bytes(b"no picture")
    err = error(tmp_path, *few, f"paths.data_root={tmp_path}/first", row="cub50-pa")
    assert "1.png is missing, truncated or no image" in err and "get the file again" in err
    (cub(tmp_path / "second") / "image_class_labels.txt").write_text("1 1\n")
    err = error(tmp_path, *few, f"paths.data_root={tmp_path}/second", row="cub50-pa-mixup")
    assert "do not match, image 2 is in one" in err
