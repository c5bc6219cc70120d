"""Bad input to a detector or a segmenter: a sentence that names the file and the remedy, and nothing is overwritten."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.dense import run, shapes, sources
from shared.dense.config import check_dense
from shared.dense.sources import Source, files_of
from shared.dense.tests.small import Tiny, group, installed, small_config
from shared.errors import UserError

KINDS = {"detection": "shapes", "segmentation": "shapes-labels"}


def copy_of_shapes(folder: Path) -> Path:
    """Draw the images of both splits into a folder, which stands for a data set that a user brings."""
    for split in sources.SPLITS:
        shapes.boxes(folder, split, folder)
    return folder / "shapes"


def annotations(change):
    def spoil(top: Path) -> None:
        path = top / "train" / shapes.ANNOTATIONS
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def rewritten(path: str, change):
    return lambda top: (top / path).write_bytes(change((top / path).read_bytes()))


def removed(path: str):
    return lambda top: (top / path).unlink()


def relabelled(path: str, change):
    def spoil(top: Path) -> None:
        with Image.open(top / path) as image:
            labels = np.array(image)
        Image.fromarray(change(labels)).save(top / path)

    return spoil


def put(value: int):
    def change(labels: np.ndarray) -> np.ndarray:
        labels[5, 7] = value
        return labels

    return change


def emptied(top: Path) -> None:
    for path in (top / "train/images").iterdir():
        path.unlink()


def as_jpeg(top: Path) -> None:
    """Put half a JPEG file in the place of the first image."""
    path = top / "train/images/000.png"
    with Image.open(path) as image:
        image.save(path, format="JPEG", quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


ANN, IMAGE, LABELS = "train/annotations.json", "train/images/000.png", "train/labels/000.png"
# Of a detector: what is done to the data, and the sentence.
DETECTION = {
    "no annotations": (removed(ANN), "annotations.json, which holds the annotations, is missing: get the data again$"),
    "no JSON": (
        rewritten(ANN, lambda _: b"\x00\x01"),
        "annotations.json cannot be read as annotations .*: get the data",
    ),
    "JSON cut short": (rewritten(ANN, half), r"annotations.json cannot be read as annotations \(JSONDecodeError: "),
    "a list": (
        rewritten(ANN, lambda _: b"[]"),
        "annotations.json cannot be read as annotations .*: get the data again$",
    ),
    "no categories": (
        annotations(lambda c: c.pop("categories")),
        r"cannot be read as annotations \(KeyError: 'categor",
    ),
    "no height": (annotations(lambda c: c["images"][3].pop("height")), r"annotations \(KeyError: 'height'\): get the"),
    "boxes without an image": (
        annotations(lambda c: [thing.update(image_id=99) for thing in c["annotations"][:3]]),
        "3 of .* boxes lie outside of their images, one of image 99 among them: .* get both again$",
    ),
    "other classes": (
        annotations(lambda c: c["categories"][1].update(name="ring")),
        "annotations.json has 2 of 3 classes, no disc among them: get the data again$",
    ),
    "no images": (
        annotations(lambda c: c.update(images=[], annotations=[])),
        "has no image to use: get the data again$",
    ),
    "no objects": (
        annotations(lambda c: c.update(annotations=[])),
        "annotations.json has no image to use: get the data",
    ),
    "another size": (
        annotations(lambda c: c["images"][0].update(height=65)),
        "000.png has annotations for another size than 64 x 64, that of .*000.png: get the data again$",
    ),
    "no image": (removed(IMAGE), r"000.png cannot be read \(FileNotFoundError: .*\): get the data again$"),
    "half a PNG": (rewritten(IMAGE, half), r"000.png cannot be read \(OSError: .*truncated.*\): get the data again$"),
    "half a JPEG": (as_jpeg, r"000.png cannot be read \(OSError: .*truncated.*\): get the data again$"),
    "no image at all": (rewritten(IMAGE, lambda _: b""), r"000.png cannot be read \(.*\): get the data again$"),
}
SEGMENTATION = {
    "no image": (emptied, "train/labels has no image to use: get the data again$"),
    "no labels": (
        removed(LABELS),
        r"images/000.png with .*labels/000.png cannot be read \(FileNotFoundError: .*\): get",
    ),
    "half a PNG": (rewritten(IMAGE, half), r"images/000.png with .*000.png cannot be read \(OSError: .*truncated"),
    "half a JPEG": (as_jpeg, r"images/000.png with .*000.png cannot be read \(OSError: .*truncated"),
    "half of the labels": (rewritten(LABELS, half), r"labels/000.png cannot be read \(OSError: .*truncated"),
    "labels of another size": (
        relabelled(LABELS, lambda labels: labels[:, :60]),
        "labels/000.png has annotations for another size than 64 x 64, that of .*images/000.png: get the data again$",
    ),
    "labels of twice the size": (
        relabelled(LABELS, lambda labels: labels.repeat(2, 0).repeat(2, 1)),
        "labels/000.png has annotations for another size than 64 x 64",
    ),
    "a label more": (relabelled(LABELS, put(4)), "labels/000.png has labels beyond its 4 classes: get the data again$"),
    "label 200": (relabelled(LABELS, put(200)), "labels/000.png has labels beyond its 4 classes: get the data again$"),
    "an image as labels": (
        relabelled(LABELS, lambda labels: np.stack([labels] * 3, -1)),
        "labels/000.png has annotations for another size than 64 x 64",
    ),
}
CASES = [(kind, name) for kind, cases in (("detection", DETECTION), ("segmentation", SEGMENTATION)) for name in cases]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use(monkeypatch, kind: str, top: Path) -> None:
    """Make a folder the data set of ``shapes`` or ``shapes-labels``."""
    name, files = KINDS[kind], {"detection": shapes.boxes, "segmentation": shapes.labels}[kind]
    own = sources.SOURCES[name]

    def found(root: Path, split: str, cache: Path) -> dict:
        there = files(root, split, cache)
        text = json.dumps(there).replace(str(cache / "shapes"), str(top))
        return json.loads(text)

    monkeypatch.setitem(sources.SOURCES, name, Source(own.kind, own.type, found, own.classes, own.void))


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_bad_data_are_one_sentence_and_nothing_is_overwritten(monkeypatch, tmp_path, kind, name):
    spoil, sentence = {"detection": DETECTION, "segmentation": SEGMENTATION}[kind][name]
    top = copy_of_shapes(tmp_path / "brought")
    spoil(top)
    use(monkeypatch, kind, top)
    cfg = small_config(kind, tmp_path, {"dense.steps": 64 // 8})  # an epoch, in which every image occurs
    folder = tmp_path / "row" / "seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    before = contents(top) | contents(folder)
    with pytest.raises(UserError, match=sentence) as error:
        run.run(cfg, Tiny(), folder)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    assert contents(top) | contents(folder) == before


@installed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_is_the_same_sentence_from_a_worker(monkeypatch, tmp_path, kind):
    top = copy_of_shapes(tmp_path / "brought")
    rewritten(IMAGE, half)(top)
    use(monkeypatch, kind, top)
    cfg = small_config(kind, tmp_path, {"dense.steps": 8, "trainer.workers": 2})
    with pytest.raises(UserError, match=r"^[^\n]*000.png cannot be read \(OSError: .*truncated.*: get the data again$"):
        run.run(cfg, Tiny(), tmp_path / "row" / "seed0")


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("segmentation", {"dense.optim.batch_size": 65}, "batch_size=65, but there are 64 training images: set 1 to"),
        ("segmentation", {"dense.optim.batch_size": 0}, "batch_size=0, but there are 64 training images: set 1 to"),
        ("detection", {"dense.optim.group": 3}, "batch_size=8 is no multiple of dense.optim.group=3: change one$"),
        ("detection", {"dense.optim.group": 0}, "batch_size=8 is no multiple of dense.optim.group=0: change one$"),
        ("detection", {"dense.optim.name": "lars"}, "dense.optim.name=lars is unknown: choose one of adamw, sgd$"),
        (
            "detection",
            {"dense.base": "mmdet::no/such.py"},
            "'mmdet::no/such.py' is no config file of mmdet: give mmdet",
        ),
        (
            "detection",
            {"dense.data.source": "cocoa"},
            "cocoa is no source for detection: choose one of coco, coco256, sha",
        ),
        (
            "segmentation",
            {"dense.data.source": "coco"},
            "coco is no source for segmentation: choose one of ade20k, camvid",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(tmp_path, kind, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run.run(small_config(kind, tmp_path, changes), Tiny(), tmp_path / "row" / "seed0")
    assert not (tmp_path / "row").exists()


@pytest.mark.parametrize(
    ("name", "changes", "precision", "sentence"),
    [
        (
            "upernet",
            {"kind": "depth"},
            "32-true",
            "dense.kind=depth is unknown: choose one of detection, segmentation$",
        ),
        ("upernet", {"epochs": 2.0}, "32-true", "dense.epochs=2.0 and dense.steps=160000: set one of them"),
        ("upernet", {"steps": None}, "32-true", "dense.epochs=None and dense.steps=None: set one of them"),
        ("upernet", {"steps": 0}, "32-true", "dense.epochs=None and dense.steps=0: set one of them to a positive"),
        (
            "camvid",
            {"epochs": -1.0},
            "32-true",
            "dense.epochs=-1.0 and dense.steps=None: set one of them to a positive",
        ),
        (
            "mask-rcnn-1x",
            {},
            "bf16-mixed",
            "precision=bf16-mixed is not supported for detection: .* choose one of 32-true$",
        ),
        ("upernet", {}, "16-mixed", "precision=16-mixed is not supported for segmentation: .*64-true, bf16-mixed$"),
        (
            "mask-rcnn-1x",
            {"epochs": None, "steps": 5},
            "32-true",
            r"milestones=\[8, 11\] are epochs, but dense.epochs is null: set dense.schedule.milestones=\[\], or",
        ),
    ],
)
def test_a_kind_a_length_and_a_precision_that_cannot_be_are_one_sentence(name, changes, precision, sentence):
    dense = group(name)
    for key, value in changes.items():
        dense[key] = value
    dense.optim.precision = precision
    with pytest.raises(UserError, match=sentence):
        check_dense(dense)


@pytest.mark.parametrize("name", ["mask-rcnn-1x", "mask-rcnn-3x", "upernet", "camvid", "fcn-r50"])
def test_the_files_of_the_group_are_accepted_as_they_are(name):
    check_dense(group(name))


@pytest.mark.parametrize(
    ("root", "sentence"), [(None, "The data root is not set"), ("absent", "absent is not a folder")]
)
@pytest.mark.parametrize("name", ["mask-rcnn-1x", "upernet", "camvid"])
def test_without_a_data_root_a_sentence_says_how_to_set_it(tmp_path, name, root, sentence):
    with pytest.raises(UserError, match=rf"{sentence}: set DATA_ROOT=<folder>, source: "):
        files_of(group(name), "train", root, tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("mask-rcnn-1x", "coco/annotations/instances_train2017.json"),
        ("upernet", "ADEChallengeData2016/images/training"),
    ],
)
def test_what_a_data_root_lacks_is_named(tmp_path, name, missing):
    with pytest.raises(
        UserError, match=rf"{missing} is missing in DATA_ROOT={tmp_path}.*put {missing} there, source: "
    ):
        files_of(group(name), "train", tmp_path, tmp_path)
