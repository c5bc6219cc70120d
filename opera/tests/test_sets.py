"""Flowers and Pets by their own lists, in tiny layouts of the published form."""

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from torchvision.io import encode_jpeg

from opera import sets
from shared.data import manifest
from shared.data.images import load_image_set
from shared.errors import UserError


@pytest.fixture
def small(monkeypatch):
    """Three classes of Flowers, two of Pets, and as many images as the layouts below have."""
    monkeypatch.setattr(sets, "FLOWERS", 3)
    monkeypatch.setattr(sets, "PETS", 2)
    load = manifest.load_manifest
    counts = {"flowers102": [6, 3], "pets": [4, 2]}
    monkeypatch.setattr(
        sets, "load_manifest", lambda name: load(name).model_copy(update={"counts": {"images": counts[name]}})
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
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for number, line in enumerate(lines):
            picture(folder / f"images/{line.split()[0]}.jpg", 40 * (number + 1))
    return tmp_path


def test_other_names_are_those_of_the_image_sets():
    images, expected = (load("digits", "test", None) for load in (sets.load_classification_set, load_image_set))
    assert np.array_equal(images.labels, expected.labels) and np.array_equal(images.pixels, expected.pixels)


def test_flowers_train_on_what_trains_and_validates_and_keep_their_labels(small, flowers):
    train, test = (sets.load_classification_set("flowers102", split, flowers) for split in ("train", "test"))
    assert train.classes == ("1", "2", "3")
    assert train.labels.tolist() == [0, 1, 2, 1, 0, 2]  # images 1, 2, 3, 5, 7, 9
    assert test.labels.tolist() == [0, 2, 1]  # images 4, 6, 8
    assert abs(float(train.image(4).float().mean()) - 140) < 2 and train.image(4).shape == (3, 10, 9)
    assert abs(float(test.image(1).float().mean()) - 120) < 2


def test_pets_are_read_by_their_lists(small, pets):
    lists = pets / "oxford-iiit-pet/annotations/trainval.txt"
    lists.write_text("#Image CLASS-ID SPECIES BREED ID\n" + lists.read_text())  # as list.txt of the same archive begins
    train, test = (sets.load_classification_set("pets", split, pets) for split in ("train", "test"))
    assert train.classes == ("Abyssinian", "pug")
    assert train.labels.tolist() == [0, 1, 0, 1] and test.labels.tolist() == [0, 1]
    assert abs(float(train.image(2).float().mean()) - 120) < 2


def test_images_and_labels_are_those_that_torchvision_reads(small, flowers, pets, monkeypatch):
    def greys(pairs) -> list[tuple[int, int]]:  # the pictures' greys are multiples of 20
        return sorted((int(label), round(float(np.asarray(image).mean()) / 20)) for image, label in pairs)

    def ours(name: str, split: str):
        images = sets.load_classification_set(name, split, flowers)
        return [(images.image(index), label) for index, label in enumerate(images.labels)]

    theirs = torchvision.datasets.Flowers102
    monkeypatch.setattr(theirs, "_check_integrity", lambda self: True)  # it knows the published files alone
    assert greys(ours("flowers102", "train")) == greys([*theirs(flowers, "train"), *theirs(flowers, "val")])
    assert greys(ours("flowers102", "test")) == greys(theirs(flowers, "test"))
    for split, name in {"train": "trainval", "test": "test"}.items():
        assert greys(ours("pets", split)) == greys(torchvision.datasets.OxfordIIITPet(pets, name))


def test_pets_that_are_other_images_than_their_names_say_are_read(small, pets):
    path = pets / "oxford-iiit-pet/images/pug_3.jpg"  # some published ones are PNG
    torchvision.io.write_png(torch.full((3, 5, 7), 90, dtype=torch.uint8), str(path))
    image = sets.load_classification_set("pets", "test", pets).image(1)
    assert image.shape == (3, 5, 7) and bool((image == 90).all())


def test_data_that_are_not_as_published_are_one_sentence(small, flowers, pets, tmp_path):
    with pytest.raises(UserError, match="there is no image set 'stl10': choose one of digits"):
        sets.load_classification_set("stl10", "train", tmp_path)
    with pytest.raises(UserError, match="pets has no split 'val'"):
        sets.load_classification_set("pets", "val", tmp_path)
    with pytest.raises(UserError, match="set DATA_ROOT=<folder>"):
        sets.load_classification_set("pets", "train", None)
    (tmp_path / "oxford-iiit-pet/images/pug_1.jpg").unlink()
    with pytest.raises(UserError, match=r"pug_1\.jpg is missing, which the lists name: get the data again"):
        sets.load_classification_set("pets", "train", tmp_path)
    scipy.io.savemat(tmp_path / "flowers-102/imagelabels.mat", {"labels": np.ones((1, 9))})
    with pytest.raises(UserError, match="name 6 images of 1 classes to train, not 6 of 3: get the data"):
        sets.load_classification_set("flowers102", "train", tmp_path)


def test_lists_without_what_they_must_hold_are_one_sentence(small, flowers):
    scipy.io.savemat(flowers / "flowers-102/setid.mat", {"nothing": np.ones(2)})
    with pytest.raises(UserError, match="the lists of Flowers-102 .* cannot be read .*get the data again"):
        sets.load_classification_set("flowers102", "train", flowers)
