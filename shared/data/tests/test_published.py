"""Flowers and Pets by their own lists, in tiny layouts of the published form; CIFAR's are in idml's tests."""

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.io import encode_jpeg

from shared.data import manifest, published
from shared.errors import UserError


@pytest.fixture
def small(monkeypatch):
    """Three classes of Flowers, two of Pets, and as many images as the layouts below have."""
    monkeypatch.setattr(published, "FLOWERS", 3)
    monkeypatch.setattr(published, "PETS", 2)
    load = manifest.load_manifest
    counts = {"flowers102": [6, 3], "pets": [4, 2]}
    monkeypatch.setattr(
        published,
        "load_manifest",
        lambda name: load(name).model_copy(update={"counts": {"images": counts[name]}}),
    )


def picture(path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.full((3, 8 + grey % 3, 9), grey, dtype=torch.uint8)
    path.write_bytes(encode_jpeg(image, 95).numpy().tobytes())


@pytest.fixture
def flowers(tmp_path):
    folder = tmp_path / "flowers-102"
    for number in range(1, 10):
        picture(folder / f"jpg/image_{number:05d}.jpg", 20 * number)
    labels = np.array([[1, 2, 3, 1, 2, 3, 1, 2, 3]])
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})
    parts = {"trnid": np.array([[7, 2, 3]]), "valid": np.array([[1, 5, 9]]), "tstid": np.array([[6, 8, 4]])}
    scipy.io.savemat(folder / "setid.mat", parts)
    return tmp_path


@pytest.fixture
def pets(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    rows = {"trainval": ["Abyssinian_2 1 1 1", "pug_1 2 2 1", "Abyssinian_1 1 1 1", "pug_12 2 2 1"]}
    rows["test"] = ["Abyssinian_9 1 1 1", "pug_3 2 2 1"]
    for split, lines in rows.items():
        (folder / "annotations" / f"{split}.txt").write_text(
            "# name class species breed\n" + "\n".join(lines) + "\n"
        )
        for number, line in enumerate(lines):
            picture(folder / f"images/{line.split()[0]}.jpg", 40 * (number + 1))
    return tmp_path


def test_flowers_train_on_what_trains_and_validates_and_keep_their_labels(small, flowers):
    train, test = (
        published.load_classification_set("flowers102", split, flowers) for split in ("train", "test")
    )
    assert train.classes == ("1", "2", "3")
    assert train.labels.tolist() == [0, 1, 2, 1, 0, 2]  # images 1, 2, 3, 5, 7, 9
    assert test.labels.tolist() == [0, 2, 1]  # images 4, 6, 8
    assert abs(float(train.image(4).float().mean()) - 140) < 2 and train.image(4).shape == (3, 10, 9)
    assert abs(float(test.image(1).float().mean()) - 120) < 2


def test_pets_are_read_by_their_lists(small, pets):
    train, test = (published.load_classification_set("pets", split, pets) for split in ("train", "test"))
    assert train.classes == ("Abyssinian", "pug")
    assert train.labels.tolist() == [0, 1, 0, 1] and test.labels.tolist() == [0, 1]
    assert abs(float(train.image(2).float().mean()) - 120) < 2


def test_data_that_are_not_as_published_are_one_sentence(small, flowers, pets, tmp_path):
    with pytest.raises(UserError, match="there is no image set 'stl10': choose one of digits"):
        published.load_classification_set("stl10", "train", tmp_path)
    with pytest.raises(UserError, match="pets has no split 'val'"):
        published.load_classification_set("pets", "val", tmp_path)
    with pytest.raises(UserError, match="set DATA_ROOT=<folder>"):
        published.load_classification_set("pets", "train", None)
    (tmp_path / "oxford-iiit-pet/images/pug_1.jpg").unlink()
    with pytest.raises(UserError, match=r"pug_1\.jpg is missing, which the lists name: get the data again"):
        published.load_classification_set("pets", "train", tmp_path)
    scipy.io.savemat(tmp_path / "flowers-102/imagelabels.mat", {"labels": np.ones((1, 9))})
    with pytest.raises(UserError, match="wrong checksum|name 6 images of 1 classes to train, not 6 of 3"):
        published.load_classification_set("flowers102", "train", tmp_path)


def test_lists_without_what_they_must_hold_are_one_sentence(small, flowers):
    scipy.io.savemat(flowers / "flowers-102/setid.mat", {"nothing": np.ones(2)})
    with pytest.raises(UserError, match="the lists of Flowers-102 .* cannot be read .*get the data again"):
        published.load_classification_set("flowers102", "train", flowers)
