"""Where boxes, masks and labels come from: classes by name, labels that count for nothing, COCO's own numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.dense import sources, yolo
from shared.dense.data import open_set, prepared
from shared.dense.libraries import detection
from shared.dense.model import classes_of, config_of, library_of
from shared.dense.sources import Source
from shared.dense.tests.small import dense_config, installed, small_config
from shared.errors import UserError

ROUNDING = 1e-9  # of an area as a sum of products in double precision, relative
pytestmark = [installed, pytest.mark.slow]


def real_data(folder: str) -> Path:
    """Return the data root; skips where it lacks the folder."""
    root = os.environ.get("DATA_ROOT")
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"DATA_ROOT is not set or has no {folder}")
    return Path(root)


def opened(cfg, split: str = "train", pipeline: list | None = None):
    library = library_of(cfg.dense)
    return open_set(library, config_of(library, cfg.dense, (8, 8, 16, 16)), cfg, split, Path(cfg.paths.runs), pipeline)


def coco_names() -> tuple[str, ...]:
    return detection().registry.DATASETS.get("CocoDataset").METAINFO["classes"]


@pytest.fixture
def small_coco(tmp_path, monkeypatch):
    """Makes ``small-coco`` a source: two images, four objects, COCO's 80 classes in another order than their numbers.

    Returns a function that writes the file and returns a configuration.
    """

    def written(change=lambda content: None):
        content = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in (7, 9)],
            "categories": [{"id": n, "name": name} for n, name in zip(yolo.NUMBERS, coco_names(), strict=True)][::-1],
            "annotations": [],
        }
        boxes = {"person": [4, 4, 20, 20], "toothbrush": [30, 4, 20, 20], "stop sign": [2, 2, 40, 30]}
        numbers = {category["name"]: category["id"] for category in content["categories"]}
        for name, image, crowd in (("person", 7, 0), ("toothbrush", 7, 0), ("stop sign", 9, 0), ("person", 9, 1)):
            x, y, width, height = box = boxes[name]
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            mask = {"size": [48, 64], "counts": [48 * 10, 48 * 4, 48 * 50]} if crowd else [polygon]
            thing = {"image_id": image, "category_id": numbers[name], "bbox": box, "area": width * height}
            thing |= {"id": len(content["annotations"]) + 1, "iscrowd": crowd, "segmentation": mask}
            content["annotations"].append(thing)
        change(content)
        for image in content["images"]:
            Image.new("RGB", (image["width"], image["height"]), "grey").save(tmp_path / image["file_name"])
        (tmp_path / "small.json").write_text(json.dumps(content))
        return small_config("detection", tmp_path, {"dense.data.source": "small-coco"})

    where = {"ann_file": str(tmp_path / "small.json"), "data_prefix": {"img": str(tmp_path)}}
    source = Source("detection", "CocoDataset", lambda root, split, cache: dict(where))
    monkeypatch.setitem(sources.SOURCES, "small-coco", source)
    return written


def test_cocos_classes_are_numbered_by_their_names_whatever_the_order_in_the_file(small_coco):
    images = opened(small_coco())
    labels = [instance["bbox_label"] for n in range(2) for instance in images.get_data_info(n)["instances"]]
    assert [coco_names()[label] for label in labels] == ["person", "toothbrush", "stop sign", "person"]
    assert labels[:2] == [0, 79] and images.cat_ids == yolo.NUMBERS
    assert (images.cat_ids[0], images.cat_ids[11], images.cat_ids[79]) == (1, 13, 90)


def test_a_class_that_the_file_lacks_is_named(small_coco):
    def drop(content):
        content["categories"] = [part for part in content["categories"] if part["name"] != "stop sign"]

    with pytest.raises(
        UserError, match=r"small.json has 79 of 80 classes, no stop sign among them: get the data again$"
    ):
        opened(small_coco(drop))


def test_crowds_are_no_objects_to_learn_but_to_ignore(small_coco):
    sample = prepared(opened(small_coco()), 1)["data_samples"]
    assert sample.gt_instances.labels.tolist() == [11] and len(sample.gt_instances.masks) == 1
    assert sample.ignored_instances.labels.tolist() == [0] and len(sample.ignored_instances.bboxes) == 1


def move(count: int, whole: int):
    def change(content):
        first = content["annotations"][0]
        for number in range(whole - len(content["annotations"])):
            content["annotations"].append(first | {"id": 10 + number})
        for thing in content["annotations"][:count]:
            thing["bbox"] = [64, 4, 20, 20]

    return change


def test_a_box_outside_of_its_image_is_left_out_with_a_warning_and_many_are_refused(small_coco, caplog):
    images = opened(small_coco(move(1, 100)))
    assert len(images.get_data_info(0)["instances"]) == 97
    assert "small.json: 1 of 100 boxes lie outside of their images and are left out" in caplog.text
    with pytest.raises(UserError, match="small.json: 2 of 100 boxes lie outside.*image 7 among them.*get both again$"):
        opened(small_coco(move(2, 100)))


def write_labels(folder: Path, labels: np.ndarray) -> None:
    for name, array in (("images", np.zeros((*labels.shape, 3), np.uint8)), ("labels", labels)):
        (folder / name).mkdir(parents=True)
        Image.fromarray(array).save(folder / name / ("0.jpg" if name == "images" else "0.png"))


def loaded(cfg) -> np.ndarray:
    """Return the labels of the first image as the loss gets them."""
    steps = [{"type": name} for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
    return prepared(opened(cfg, pipeline=steps), 0)["data_samples"].gt_sem_seg.data[0].numpy()


@pytest.mark.parametrize(
    ("name", "classes", "mapping"),
    [
        ("ade20k", 150, {0: 255, 1: 0, 2: 1, 150: 149}),
        ("camvid", 11, {0: 0, 1: 1, 10: 10, 11: 255}),
        ("shapes-labels", 4, {0: 0, 3: 3}),
    ],
)
def test_labels_are_classes_and_those_that_count_for_nothing_are_ignored(monkeypatch, tmp_path, name, classes, mapping):
    labels = np.array(list(mapping), np.uint8).reshape(1, -1).repeat(3, 0)
    write_labels(tmp_path, labels)
    prefix = {"img_path": str(tmp_path / "images"), "seg_map_path": str(tmp_path / "labels")}
    own = sources.SOURCES[name]
    here = Source(own.kind, own.type, lambda *_: {"data_prefix": prefix}, own.classes, own.void)
    monkeypatch.setitem(sources.SOURCES, name, here)
    monkeypatch.delitem(sources.MANIFESTS, name, raising=False)
    cfg = small_config("segmentation", tmp_path, {"dense.data.source": name})
    assert classes_of(cfg.dense) == classes
    np.testing.assert_array_equal(loaded(cfg), np.array([list(mapping.values())] * 3))


def test_the_256_images_of_coco_have_boxes_that_bound_their_polygons(tmp_path):
    root = real_data(yolo.FOLDER)
    cfg = dense_config("mask-rcnn-1x", tmp_path, {"dense.data.source": "coco256", "paths.data_root": str(root)})
    for split, name in (("train", "train2017"), ("test", "val2017")):
        images = opened(cfg, split)
        content = json.loads((tmp_path / "runs" / f"coco256-{name}.json").read_text())
        assert len(content["images"]) == 100 >= len(images) > 90
        assert len({thing["id"] for thing in content["annotations"]}) == len(content["annotations"]) > 500
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for thing in content["annotations"]:
            corners = np.array(thing["segmentation"][0]).reshape(-1, 2)
            low, high = corners.min(0), corners.max(0)
            assert thing["bbox"] == [*low, *(high - low)]
            assert (low >= 0).all() and (high <= sizes[thing["image_id"]]).all()
            assert 0 < thing["area"] <= thing["bbox"][2] * thing["bbox"][3] * (1 + ROUNDING)
        for image in content["images"]:
            with Image.open(root / yolo.FOLDER / "images" / name / image["file_name"]) as picture:
                assert picture.size == sizes[image["id"]]


def test_the_numbers_of_cocos_classes_have_cocos_gaps():
    names = dict(zip(yolo.NUMBERS, coco_names(), strict=True))
    # Of COCO's API: the first behind each of the ten gaps, and both ends.
    known = {1: "person", 13: "stop sign", 27: "backpack", 31: "handbag", 46: "wine glass", 67: "dining table"}
    known |= {70: "toilet", 72: "tv", 84: "book", 90: "toothbrush"}
    assert {number: names[number] for number in known} == known


@pytest.mark.parametrize(
    "line", ["12 0.1 0.1 0.2 0.2 0.3 0.1", "1 0.1 0.1 0.2", "1 0.1 0.1 0.2 0.2", "cat 0.1 0.1", "1", "1 0.1 x"]
)
def test_a_line_that_is_no_class_and_polygon_is_refused_with_its_file(tmp_path, line):
    images = tmp_path / yolo.FOLDER / "images/train2017"
    labels = tmp_path / yolo.FOLDER / "instance_segmentation/labels/train2017"
    images.mkdir(parents=True), labels.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(images / "000000000009.jpg")
    (labels / "000000000009.txt").write_text(line)
    with pytest.raises(UserError, match=r"000000000009.txt: .* is no class and polygon: get the data again$"):
        yolo.annotations(tmp_path, "train2017", coco_names())


def test_the_annotations_are_made_before_anything_else_asked_for_mmdet(tmp_path):
    code = "import pathlib, sys, shared.dense.yolo; path = pathlib.Path(sys.argv[1])"
    code += "; shared.dense.yolo.files(path, 'test', path)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(json.loads((tmp_path / "coco256-val2017.json").read_text())["categories"]) == 80
