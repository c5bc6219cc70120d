"""Image sets: what a folder of images becomes, what is kept, and one clear sentence for what is wrong."""

import hashlib
import json
import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.data import images, manifest
from shared.data.images import ImageFiles, load_image_set
from shared.data.manifest import load_manifest, manifest_sha256
from shared.errors import UserError

CLASSES = ("ape", "bee", "cat")


def picture(seed: int, size=(8, 8), mode="RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def store(path: Path, seed: int, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **how).save(path)


def sha256sum(root: Path) -> str:
    """Return what the usual tools say of a folder; the labels file, if any, comes last."""
    images = "find . -name '*.jpg' | sed 's|^./||' | LC_ALL=C sort | xargs sha256sum"
    command = f"{images}; if [ -e labels.tsv ]; then sha256sum labels.tsv; fi"
    listing = subprocess.run(["sh", "-c", command], cwd=root, capture_output=True, check=True).stdout
    return hashlib.sha256(listing).hexdigest()


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data root with a toy set: three classes of 4 training and 2 test images; decoded arrays go to `cache`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "FOLDER", tmp_path / "manifests")
    (tmp_path / "manifests").mkdir()
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                store(tmp_path / f"data/toy/{split}/{name}/{number}.jpg", 100 * label + number + len(split))
    describe(tmp_path / "data")
    return tmp_path / "data"


def describe(root: Path, test: dict | None = None, **changes) -> None:
    """Write the manifest of the toy set as it is now, with changes to the training folder."""
    train = {"split": "train", "path": "toy/train", "classes": 3, "images": 12, "per_class": 4, "size": 8}
    test = {"split": "test", "path": "toy/val", "classes": 3, "images": 6, "per_class": 2, "size": 8, **(test or {})}
    entries = [{**train, **changes}, test]
    for entry in entries:
        entry.setdefault("sha256", sha256sum(root / entry["path"]))
    content = {"name": "toy", "title": "Toy", "source": "the toy shop", "terms": "none", "files": []}
    path = manifest.FOLDER / "toy.yml"
    path.write_text(json.dumps({**content, "folders": entries}))  # JSON is YAML


def tree(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*"))


# What a set is


def test_digits_are_three_equal_channels_and_two_disjoint_splits():
    train, test = (load_image_set("digits", split, None) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359) and train.classes == tuple("0123456789")
    for part in (train, test):
        batch = part.batch(np.arange(len(part)))
        assert batch.shape == (len(part), 3, 8, 8) and batch.dtype == torch.uint8 and batch.max() == 255
        assert torch.equal(batch[:, 0], batch[:, 1]) and torch.equal(batch[:, 0], batch[:, 2])
        assert part.labels.dtype == np.int64 and set(part.labels.tolist()) == set(range(10))


def test_a_folder_per_class_is_read_in_order_with_the_pixels_of_its_files(root):
    part = load_image_set("toy", "train", root)
    assert part.classes == CLASSES and part.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    paths = [root / f"toy/train/{name}/{number}.jpg" for name in CLASSES for number in range(4)]
    for index, path in enumerate(paths):
        with Image.open(path) as file:
            assert np.array_equal(part.image(index).permute(1, 2, 0).numpy(), np.array(file))
    assert torch.equal(part.batch(np.array([7, 2])), torch.stack([part.image(7), part.image(2)]))
    assert load_image_set("toy", "test", str(root)).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_images_in_folders_below_their_class_and_other_files_are_no_matter(root):
    plain = load_image_set("toy", "train", root)
    for name in CLASSES:
        (root / f"toy/train/{name}/images").mkdir()
        for number in range(4):
            (root / f"toy/train/{name}/{number}.jpg").rename(root / f"toy/train/{name}/images/{number}.jpg")
        (root / f"toy/train/{name}/boxes.txt").write_text("1 2 3 4")
    describe(root)
    nested = load_image_set("toy", "train", root)
    assert np.array_equal(nested.pixels, plain.pixels) and np.array_equal(nested.labels, plain.labels)


def flat(root: Path) -> Path:
    """Turn the test split into one folder of images with a labels file, which is returned."""
    rows = []
    for label, name in enumerate(CLASSES):
        for number in range(2):
            target = f"val_{2 - label}{number}.jpg"  # the order of the names is not that of the classes
            (root / "toy/val/images").mkdir(exist_ok=True)
            (root / f"toy/val/{name}/{number}.jpg").rename(root / f"toy/val/images/{target}")
            rows.append(f"{target}\t{name}\t0\t0\t7\t7\n")
        (root / f"toy/val/{name}").rmdir()
    (root / "toy/val/labels.tsv").write_text("".join(rows))
    describe(root, {"labels_file": "labels.tsv"})
    return root / "toy/val/labels.tsv"


def test_a_labels_file_gives_the_classes_of_images_in_one_folder(root):
    before = load_image_set("toy", "test", root)
    flat(root)
    after = load_image_set("toy", "test", root)
    assert after.classes == CLASSES and after.labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert np.array_equal(after.pixels, before.pixels[[4, 5, 2, 3, 0, 1]])


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png")])
def test_images_of_other_colours_become_rgb(root, mode, suffix):
    for path in (root / "toy/train/bee").iterdir():
        path.unlink()
    for number in range(4):
        store(root / f"toy/train/bee/{number}.{suffix}", number, size=(20, 10), mode=mode)
    describe(root, size=None, sha256=None)
    part = load_image_set("toy", "train", root)
    assert isinstance(part, ImageFiles)
    image = part.image(5)
    with Image.open(root / f"toy/train/bee/1.{suffix}") as file:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(file.convert("RGB")))
    assert image.dtype == torch.uint8 and image.shape == (3, 10, 20)
    assert [tuple(each.shape) for each in part.batch(np.array([0, 5]))] == [(3, 8, 8), (3, 10, 20)]


# What is kept


def test_small_images_are_decoded_once_and_nothing_is_written_into_the_data_root(root, monkeypatch):
    before = tree(root)
    first = load_image_set("toy", "train", root)
    assert tree(root) == before and len(os.listdir(images.cache_folder())) == 1
    monkeypatch.setattr(images, "read_image", None)
    again = load_image_set("toy", "train", root)
    assert np.array_equal(again.pixels, first.pixels) and isinstance(again.pixels, np.memmap)


def test_half_a_cache_file_is_written_again(root):
    first = np.array(load_image_set("toy", "train", root).pixels)
    (path,) = images.cache_folder().iterdir()
    for length in (0, 50, len(path.read_bytes()) - 1):
        path.write_bytes(path.read_bytes()[:length])
        assert np.array_equal(load_image_set("toy", "train", root).pixels, first)
    assert list(images.cache_folder().iterdir()) == [path]  # no temporary file is left


def test_a_cache_that_cannot_be_written_is_a_warning_and_not_an_error(root, caplog):
    images.cache_folder().parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        part = load_image_set("toy", "train", root)
    assert part.batch(np.arange(12)).shape == (12, 3, 8, 8) and "could not be kept" in caplog.text


# What is wrong


def spoil_truncate(root):
    path = root / "toy/train/bee/2.jpg"
    path.write_bytes(path.read_bytes()[:-40])


def spoil_foreign(root):
    (root / "toy/train/bee/2.jpg").write_text("<html>404 Not Found</html>")


def spoil_nothing(root):
    (root / "toy/train/bee/2.jpg").write_bytes(b"")


def spoil_swap(root):
    store(root / "toy/train/bee/2.jpg", 999)


def spoil_size(root):
    store(root / "toy/train/bee/2.jpg", 1, size=(6, 7))


def spoil_animation(root):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "toy/train/bee/2.jpg", "GIF", save_all=True, append_images=frames[1:])


def spoil_class(root):
    for path in (root / "toy/train/bee").iterdir():
        path.unlink()
    (root / "toy/train/bee").rmdir()


def spoil_rename(root):
    (root / "toy/train/bee").rename(root / "toy/train/wasp")


def spoil_all_bees(root):
    spoil_class(root)
    for number in range(2):
        (root / f"toy/val/bee/{number}.jpg").unlink()
    (root / "toy/val/bee").rmdir()


def spoil_empty(root):
    spoil_class(root)
    (root / "toy/train/bee").mkdir()


def spoil_count(root):
    (root / "toy/train/bee/2.jpg").unlink()


def spoil_stray(root):
    (root / "toy/train/bee/2.jpg").rename(root / "toy/train/2.jpg")


def spoil_split(root):
    (root / "toy/train").rename(root / "toy/training")


SPOILED = [
    (spoil_truncate, r"bee/2\.jpg is missing, truncated or no image \(Image is incomplete or truncated\)"),
    (spoil_foreign, r"bee/2\.jpg is missing, truncated or no image \(Unsupported image file\)"),
    (spoil_nothing, r"bee/2\.jpg is missing, truncated or no image"),
    (spoil_swap, r"toy/train has the wrong checksum: expected sha256 \w{64} .* found \w{64}"),
    (spoil_size, r"bee/2\.jpg has 6 x 7 pixels, not 8 x 8"),
    (spoil_animation, r"bee/2\.jpg is missing, truncated or no image \(an animation, several images in one file\)"),
    (spoil_class, r"toy/train has no class bee, which toy/val has"),
    (spoil_rename, r"toy/val has no class wasp, which toy/train has"),
    (spoil_all_bees, r"toy/train has 2 classes, not 3"),
    (spoil_empty, r"toy/train/bee is empty"),
    (spoil_count, r"toy/train has 3 images of class bee, not 4"),
    (spoil_stray, r"toy/train/2\.jpg belongs to no class"),
    (spoil_split, r"toy/train is missing in DATA_ROOT=.*put toy/train there"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILED, ids=[spoil.__name__ for spoil, _ in SPOILED])
def test_wrong_data_give_one_sentence_with_the_file_and_the_source(root, spoil, words):
    spoil(root)
    with pytest.raises(UserError, match=rf"{words}.*source: the toy shop$") as error:
        load_image_set("toy", "train", root)
    assert "\n" not in str(error.value) and str(root) in str(error.value)
    assert not images.cache_folder().exists() or os.listdir(images.cache_folder()) == []


def test_a_wrong_total_is_refused_where_the_classes_are_not_counted(root):
    describe(root, per_class=None, size=None, sha256=None, images=13)
    with pytest.raises(UserError, match="toy/train has 12 images, not 13.*the toy shop"):
        load_image_set("toy", "train", root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"labels\.tsv, which gives the classes of the images, is missing"),
        ("val_00.jpg ape\n", r"labels\.tsv has a line without a tab"),
        ("val_00.jpg\tape\nval_01.jpg\tbee\nval_10.jpg\tcat\n", r"val_11\.jpg belongs to no class"),
    ],
)
def test_a_labels_file_that_is_missing_or_damaged_is_refused_by_name(root, text, words):
    path = flat(root)
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"{words}.*the toy shop"):
        load_image_set("toy", "test", root)


@pytest.mark.parametrize(
    ("name", "split", "data_root", "words"),
    [
        ("cifar", "train", None, "no image set 'cifar'.*digits, toy"),
        ("digits", "val", None, "no split 'val': choose train or test"),
        ("toy", "val", None, "no split 'val': choose train or test"),
        ("toy", "train", None, "The data root is not set: set DATA_ROOT=.*put toy/train there.*the toy shop"),
        ("toy", "train", "", "The data root is not set"),
        ("toy", "train", "absent", "The data root absent is not a folder: set DATA_ROOT=.*put toy/train there"),
    ],
)
def test_an_unknown_name_and_an_absent_data_root_say_what_to_do(root, name, split, data_root, words):
    with pytest.raises(UserError, match=words):
        load_image_set(name, split, data_root)


def test_a_split_that_a_manifest_lacks_is_refused(root):
    path = manifest.FOLDER / "toy.yml"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "folders": content["folders"][:1]}))
    assert len(load_image_set("toy", "train", root)) == 12
    with pytest.raises(UserError, match="toy has no split 'test'"):
        load_image_set("toy", "test", root)


def test_a_set_that_is_kept_needs_a_checksum(root):
    describe(root, sha256=None)
    with pytest.raises(UserError, match=r"toy\.yml is not a valid manifest.*sha256, which must be given"):
        load_image_set("toy", "train", root)


def test_an_image_truncated_later_is_named_when_it_is_needed(root):
    describe(root, size=None, sha256=None)
    part = load_image_set("toy", "train", root)
    spoil_truncate(root)
    part.batch(np.array([0, 1]))
    with pytest.raises(UserError, match=r"bee/2\.jpg is missing, truncated"):
        part.batch(np.array([0, 6]))


# The hash of a manifest


def test_hash_of_a_manifest_follows_its_folders(root):
    first = manifest_sha256(load_manifest("toy"))
    store(root / "toy/val/ape/0.jpg", 77)
    describe(root)
    assert manifest_sha256(load_manifest("toy")) != first


def test_hash_of_a_manifest_without_folders_is_what_it_was_before_there_were_any():
    pinned = "a4d7561470d5dc5eb39f216bf2f9f35ca43e26e83c91765ce3ce23b5b6fa759e"
    assert manifest_sha256(load_manifest("digits")) == pinned


# The real data

REAL = [
    ("cifar10_jpg", "test", 10, 10_000, 32),
    pytest.param("cifar10_jpg", "train", 10, 50_000, 32, marks=pytest.mark.slow),
    pytest.param("tinyimagenet32", "test", 200, 10_000, 32, marks=pytest.mark.slow),
    pytest.param("tinyimagenet32", "train", 200, 100_000, 32, marks=pytest.mark.slow),
    pytest.param("imagenette96", "test", 10, 3_925, 96, marks=pytest.mark.slow),
    pytest.param("imagenette96", "train", 10, 9_469, 96, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "split", "classes", "count", "size"), REAL)
def test_the_real_images_are_those_of_the_manifest(name, split, classes, count, size, tmp_path, monkeypatch):
    data_root = os.environ.get("DATA_ROOT")
    paths = [folder.path for folder in load_manifest(name).folders]
    if not data_root or not all((Path(data_root) / path).is_dir() for path in paths):
        pytest.skip(f"DATA_ROOT is not set or has no {' and '.join(paths)}: {name} is not embedded")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part = load_image_set(name, split, data_root)
    assert (len(part), len(part.classes), part.image(0).shape) == (count, classes, (3, size, size))
    assert 20 < np.asarray(part.pixels[::97]).mean() < 235  # pictures, not a field of black or white
