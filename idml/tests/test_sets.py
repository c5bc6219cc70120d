"""Retrieval sets: disjoint classes, and annotations that do not match in one sentence."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.io import write_png

from idml.sets import load_retrieval_set, retrieval_set_names
from shared.data import manifest
from shared.data.manifest import load_manifest
from shared.errors import UserError

CLASSES, PER_CLASS = 4, 2
COUNTS = {"classes": [2, 2], "images": [4, 4]}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a data root with small sets of the published forms: 4 classes of 2 images, the half of them to train."""
    monkeypatch.setattr(manifest, "FOLDER", tmp_path / "manifests")
    manifest.FOLDER.mkdir()
    root = tmp_path / "data"
    return root


def describe(name: str, files: list[str], counts=COUNTS) -> None:
    lines = [f"name: {name}", "title: Toy", "source: the toy shop", "terms: none", "files:"]
    for file in files:
        lines += [f"  - path: {file}", "    sha256: null"]
    lines += [f"counts: {{classes: {counts['classes']}, images: {counts['images']}}}"]
    (manifest.FOLDER / f"{name}.yml").write_text("\n".join(lines))


def picture(path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(torch.full((3, 8, 8), value, dtype=torch.uint8), str(path))


def images():
    """Yield number, class and a value of every image, in an order of their own."""
    for number in range(CLASSES * PER_CLASS):
        yield number + 1, number % CLASSES + 1, 10 * (number + 1)


def cub(root):
    describe("cub50", ["toy/images.txt", "toy/image_class_labels.txt"])
    folder = root / "toy"
    for number, label, value in images():
        picture(folder / f"images/{label:03}.bird/{number}.png", value)
    (folder / "images.txt").write_text("".join(f"{n} {c:03}.bird/{n}.png\n" for n, c, _ in images()))
    (folder / "image_class_labels.txt").write_text("".join(f"{n} {c}\n" for n, c, _ in images()))
    return folder


def cars(root, whole: bool):
    name, file = ("cars196", "toy/cars_annos.mat") if whole else ("cars196_train", "toy/devkit/cars_train_annos.mat")
    describe(name, [file])
    key, folder = ("relative_im_path", "car_ims/") if whole else ("fname", "")
    rows = [(f"{folder}{n}.png", c) for n, c, _ in images()]
    for number, _, value in images():
        picture(root / "toy" / (folder or "cars_train/") / f"{number}.png", value)
    annotations = np.array(rows, dtype=[(key, "O"), ("class", "O")])
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(root / file, {"annotations": annotations})
    return root / file


def sop(root):
    describe("sop", ["toy/Ebay_train.txt", "toy/Ebay_test.txt"])
    for split, wanted in (("train", (1, 2)), ("test", (3, 4))):
        lines = ["image_id class_id super_class_id path\n"]
        for number, label, value in images():
            if label in wanted:
                picture(root / f"toy/bicycle_final/{number}.png", value)
                lines.append(f"{number} {label} 1 bicycle_final/{number}.png\n")
        (root / f"toy/Ebay_{split}.txt").write_text("".join(lines))


MAKERS = {
    "cub50": cub,
    "cars196": lambda root: cars(root, True),
    "cars196_train": lambda root: cars(root, False),
    "sop": sop,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_first_half_of_the_classes_trains_and_the_other_tests(root, name):
    MAKERS[name](root)
    expected = {"train": [(0, 10), (0, 50), (1, 20), (1, 60)], "test": [(0, 30), (0, 70), (1, 40), (1, 80)]}
    for split, pairs in expected.items():
        actual = load_retrieval_set(name, split, root)
        values = [int(actual.image(index)[0, 0, 0]) for index in range(len(actual))]
        assert list(zip(actual.labels.tolist(), values, strict=True)) == pairs
        assert actual.classes == (("1", "2") if split == "train" else ("3", "4"))


def test_digits_train_on_five_classes_and_test_on_five_others():
    train, test = (load_retrieval_set("digits", split, None) for split in ("train", "test"))
    assert train.classes == tuple("01234") and test.classes == tuple("56789")
    assert len(train) + len(test) == 1797 and set(test.labels.tolist()) == set(range(5))


@pytest.mark.parametrize("name", [name for name in retrieval_set_names() if name != "digits"])
def test_every_set_has_a_manifest_whose_counts_are_those_of_two_splits(name):
    counts = load_manifest(name).counts
    assert sorted(counts) == ["classes", "images"] and all(len(numbers) == 2 for numbers in counts.values())


def test_an_annotated_image_that_is_not_there_is_one_sentence(root):
    (cub(root) / "images/001.bird/1.png").unlink()
    with pytest.raises(UserError, match=r"1.png is missing, which the annotations name: .* source: the toy shop"):
        load_retrieval_set("cub50", "train", root)


def test_annotation_files_that_do_not_match_each_other_are_one_sentence(root):
    folder = cub(root)
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n")
    with pytest.raises(UserError, match="images.txt and .*image_class_labels.txt do not match, image 3 is in one"):
        load_retrieval_set("cub50", "train", root)


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "images.txt and .*image_class_labels.txt do not match, image 1 is in one"),
        ("1 a b\n", "line 1, has 3 columns, not 2"),
        ("".join(f"{n} one\n" for n, _, _ in images()), "has 'one' where a number is expected"),
        ("".join(f"{n} 1\n" for n, _, _ in images()), "name 8 images of 1 classes, not 8 of 4"),
    ],
)
def test_annotations_that_are_damaged_are_one_sentence(root, content, words):
    (cub(root) / "image_class_labels.txt").write_text(content)
    with pytest.raises(UserError, match=words):
        load_retrieval_set("cub50", "train", root)


def test_matlab_annotations_that_are_cut_short_are_one_sentence(root):
    path = cars(root, True)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cars_annos.mat .*again"):
        load_retrieval_set("cars196", "train", root)


def test_annotations_of_nothing_are_one_sentence(root):
    folder = cub(root)
    for name in ("images.txt", "image_class_labels.txt"):
        (folder / name).write_text("")
    with pytest.raises(UserError, match="name 0 images of 0 classes, not 8 of 4: get the data again"):
        load_retrieval_set("cub50", "test", root)


def test_a_split_that_is_empty_is_one_sentence(root):
    folder = cub(root)
    describe("cub50", ["toy/images.txt", "toy/image_class_labels.txt"], {"classes": [4, 0], "images": [8, 0]})
    assert len(load_retrieval_set("cub50", "train", root)) == 8
    with pytest.raises(UserError, match=f"the test classes of {folder} have no images: get the data again"):
        load_retrieval_set("cub50", "test", root)


def test_a_split_of_another_size_than_the_manifest_counts_is_one_sentence(root):
    cub(root)
    describe("cub50", ["toy/images.txt", "toy/image_class_labels.txt"], {"classes": [2, 2], "images": [3, 5]})
    with pytest.raises(UserError, match="the train classes of .*toy have 4 images, not 3"):
        load_retrieval_set("cub50", "train", root)


def test_the_real_birds_are_those_of_the_manifest_and_no_class_is_on_both_sides():
    data_root = os.environ.get("DATA_ROOT")
    if not data_root or not (Path(data_root) / "cub50_s128").is_dir():
        pytest.skip("DATA_ROOT is not set or has no folder cub50_s128: the birds are not embedded")
    train, test = (load_retrieval_set("cub50", split, data_root) for split in ("train", "test"))
    assert (len(train), len(test)) == (1402, 1487) and not set(train.classes) & set(test.classes)
    assert min(train.image(0).shape[1:]) == 128 and train.image(0).dtype == torch.uint8


def test_an_unknown_set_names_the_known_ones():
    with pytest.raises(UserError, match="no retrieval set 'birds' .* choose a set from digits, cub200"):
        load_retrieval_set("birds", "train", None)
