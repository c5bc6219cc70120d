"""The figure of the levels is drawn from any image file; a file that is none is one sentence."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from globalmamba.serialization import FrequencySerialization
from globalmamba.tools import figures
from shared.errors import UserError


def build(**choices) -> FrequencySerialization:
    return FrequencySerialization(image_size=32, patch_size=4, embed_dim=1, levels=3, **choices)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)  # grey, not square
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_any_image_is_cut_to_the_wanted_size(photo):
    image = figures.load_image(photo, 32)
    assert image.shape == (1, 3, 32, 32) and image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize(
    "choices", [{}, {"variant": "as_released", "bands": "disjoint", "order": "random"}, {"content": "replicated"}]
)
def test_levels_are_drawn(photo, tmp_path, choices):
    figures.draw_levels(tmp_path / "made" / "levels.png", figures.load_image(photo, 32), build(**choices))
    with Image.open(tmp_path / "made" / "levels.png") as drawn:
        assert drawn.format == "PNG" and drawn.convert("L").getextrema()[0] < 255


def test_places_number_the_tokens_in_the_order_of_the_sequence():
    low, middle, top = figures.token_places(build())
    assert low.tolist() == [[1, 2], [3, 4]] and middle.min() == 5 and top.max() == 84
    low, _, top = figures.token_places(build(order="high-low"))
    assert top[0, 0] == 1 and low.tolist() == [[81, 82], [83, 84]]
    shuffled = build(order="random")
    places = np.concatenate([p.reshape(-1) for p in figures.token_places(shuffled)])
    assert (places[shuffled.permutation] == np.arange(1, 85)).all()


def test_a_file_that_is_no_image_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match="text.jpg"):
        figures.load_image(tmp_path / "text.jpg", 32)
    monkeypatch.setattr(sys, "argv", ["figures", str(tmp_path / "text.jpg"), str(tmp_path / "levels.png")])
    with pytest.raises(SystemExit) as stop:
        figures.main()
    assert stop.value.code == 2 and "text.jpg" in capsys.readouterr().err
    assert not (tmp_path / "levels.png").exists()
