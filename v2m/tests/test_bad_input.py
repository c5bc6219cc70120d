"""Damaged pictures end a run with one line that names the file and its source (other bad input: ``contract.py``)."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data import manifest
from shared.testing.applications import call_application
from v2m.tests.contract import CONTRACT


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A data root of eight training and two test images of two classes, read when they are needed."""
    monkeypatch.setattr(manifest, "FOLDER", tmp_path / "manifests")
    root, folders = tmp_path / "pictures", []
    for split, count in (("train", 4), ("test", 1)):
        for number in range(2 * count):
            path = root / f"toy/{split}/{'ab'[number % 2]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
        numbers = {"classes": 2, "images": 2 * count, "per_class": count, "sha256": None}
        folders.append({"split": split, "path": f"toy/{split}", **numbers})
    manifest.FOLDER.mkdir()
    said = {"name": "toy", "title": "Toy", "source": "the toy shop", "terms": "none", "files": []}
    (manifest.FOLDER / "toy.yml").write_text(json.dumps({**said, "folders": folders}))  # JSON is YAML
    return root


@pytest.mark.parametrize("damage", ["truncated image", "missing folder"])
def test_damaged_data_are_one_line_with_their_source(damage, pictures, tmp_path):
    if damage == "truncated image":
        path = pictures / "toy/train/b/3.png"
        path.write_bytes(path.read_bytes()[:40])
        words = "toy/train/b/3.png is missing, truncated or no image"
    else:
        (pictures / "toy/train").rename(pictures / "elsewhere")
        words = "toy/train is missing in DATA_ROOT="
    data = ["data.manifest=toy", "data.classes=2", "scale.epochs=1", "optim.batch_size=8"]
    line = CONTRACT.overrides(tmp_path, *data, f"paths.data_root={pictures}")
    ended = call_application(CONTRACT.paper, "train", *line)
    assert ended.code == 2 and len(ended.errors) == 1
    assert words in ended.err and "source: the toy shop" in ended.err
    assert not list(tmp_path.rglob("seed0.json"))
