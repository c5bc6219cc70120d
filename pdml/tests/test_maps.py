"""The pictures of a run: they are written, and their pixels are those of the maps."""

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image

from pdml import maps
from pdml.inference import Readout, ScenePrediction
from pdml.maps import class_picture, draw_curves, draw_maps
from pdml.scenes import Scene
from pdml.splits import Split
from shared.claims.compose import compose
from shared.data.keyed import keyed_uniform

COLOURS = ["#ff0000", "#00c000", "#0000ff"]


def _scene(height, width):
    draw = keyed_uniform(3, np.arange(height * width)).reshape(height, width)
    labels = (draw * 4).astype(np.int16)
    scene = Scene("a scene", np.zeros((height, width, 2)), labels, ["a", "b", "c"], COLOURS)
    train = (draw < 0.5) & (labels > 0)
    blocks = np.broadcast_to(np.arange(width) >= width // 2, (height, width)).astype(np.int8)
    split = Split(train, ~train & (labels > 0), np.array([True, True, False]), blocks)
    return scene, split, Readout(labels - 1, draw.astype(np.float32))


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def _colours(path):
    return {tuple(pixel) for pixel in np.unique(_pixels(path), axis=0)}


@pytest.mark.parametrize(("height", "width"), [(40, 12), (12, 80)])
def test_the_maps_of_a_run_are_drawn_in_their_colours(tmp_path, height, width):
    scene, split, readout = _scene(height, width)
    draw_maps(tmp_path, scene, split, ScenePrediction(readout, None))
    classes = {(255, 0, 0), (0, 192, 0), (0, 0, 255), (217, 217, 217)}
    assert classes <= _colours(tmp_path / "classification.png")
    assert len(_colours(tmp_path / "uncertainty.png")) > 50
    sides = {(214, 39, 40), (31, 119, 180), (244, 204, 204), (207, 226, 243)}
    assert sides <= _colours(tmp_path / "split.png")
    assert (tmp_path / "confusion.png").stat().st_size > 0
    assert not (tmp_path / "curves.png").exists()


def test_the_fused_read_out_is_drawn_where_there_is_one(tmp_path):
    scene, split, readout = _scene(20, 30)
    nothing = Readout(np.full_like(readout.prediction, -1), np.ones_like(readout.uncertainty))
    draw_maps(tmp_path / "fused", scene, split, ScenePrediction(nothing, readout))
    draw_maps(tmp_path / "centre", scene, split, ScenePrediction(nothing, None))
    fused, centre = (_pixels(tmp_path / name / "classification.png") for name in ("fused", "centre"))
    assert (fused == (255, 0, 0)).all(1).sum() > 1.5 * (centre == (255, 0, 0)).all(1).sum() > 0


def test_pixels_that_were_not_decided_are_background(tmp_path):
    scene, split, readout = _scene(20, 30)
    readout.prediction[:10], readout.uncertainty[:10] = -1, np.nan
    random_split = Split(split.train, split.test, split.classes)
    draw_maps(tmp_path, scene, random_split, ScenePrediction(readout, None))
    assert (217, 217, 217) in _colours(tmp_path / "uncertainty.png")
    picture = class_picture(np.array([[0, 2]]), COLOURS)
    assert [tuple((255 * pixel).round()) for pixel in picture[0]] == [(217, 217, 217), (0, 192, 0)]


def test_the_curves_of_a_run_are_drawn_from_the_logs_of_all_its_starts(tmp_path, monkeypatch):
    for _ in range(2):
        logger = instantiate(compose("pdml", []).logger.csv, save_dir=tmp_path)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.save()
    drawn = []
    monkeypatch.setattr(maps, "draw_curves", lambda folder, logs: drawn.extend(logs))
    scene, split, readout = _scene(20, 30)
    draw_maps(tmp_path, scene, split, ScenePrediction(readout, None))
    assert [log.relative_to(tmp_path).parts[1] for log in drawn] == ["version_0", "version_1"]


def test_curves_are_drawn_from_a_log_with_gaps(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,labelled_pixels,loss,step\n0,40,1.5,0\n0,,1.0,9\n1,44,nan,19\n1,41,0.5,29\n")
    draw_curves(tmp_path, [log])
    assert len(_colours(tmp_path / "curves.png")) > 10
    log.write_text("")
    draw_curves(tmp_path, [log])
