"""Images with boxes, masks or labels as mmdet and mmseg prepare them, in an order and with draws that are keyed."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from shared.data.keyed import keyed_bits, stream
from shared.data.sampler import KeyedBatchSampler
from shared.dense.draws import keyed_draws
from shared.dense.libraries import Library, quiet
from shared.dense.model import classes_of
from shared.dense.sources import files_of, source_of
from shared.errors import UserError
from shared.training.fit import TrainingData

TRANSFORMS, REFETCH = stream("dense.transforms"), stream("dense.refetch")
MOST_REFETCHES = 100  # of an image in place of one whose crop holds no object
IGNORED = 255  # mmseg's label of pixels that count for nothing
MOST_OUTSIDE = 0.01  # of the boxes may lie outside of their images; mmdet leaves them out without a word
NOWHERE = {"width": 0, "height": 0}  # an image that the annotations do not name
log = logging.getLogger(__name__)


def open_set(library: Library, config, cfg, split: str, cache: Path, pipeline: list | None = None):
    """Return mmdet's or mmseg's data set of a split, "train" or "test", with the transforms of ``config``.

    ``pipeline`` takes their place. Raises UserError for files that are missing, damaged, or of other classes.
    """
    source, arguments = source_of(cfg.dense), files_of(cfg.dense, split, cfg.paths.data_root, cache)
    described = config[{"train": "train_dataloader", "test": "test_dataloader"}[split]].dataset
    steps = described.pipeline if pipeline is None else pipeline
    checked = [part for step in steps for part in _strict(step, classes_of(cfg.dense))]
    arguments |= {"type": source.type, "pipeline": checked, "test_mode": split == "test"}
    if source.classes is not None:
        arguments["metainfo"] = {"classes": source.classes}
    if split == "train" and "filter_cfg" in described:
        arguments["filter_cfg"] = described.filter_cfg
    where = arguments.get("ann_file") or arguments["data_prefix"]["seg_map_path"]
    if not Path(where).exists():
        raise UserError(f"{where}, which holds the annotations, is missing: get the data again")
    images = library.build(arguments | {"lazy_init": True, "serialize_data": False}, "DATASETS")
    if source.void is not None:
        images.label_map = {source.void: IGNORED}
    try:
        if source.kind == "detection":
            things = _read_by_names(images, where)
        with quiet():
            images.full_init()
    except Exception as error:  # the readers raise almost anything on what is no annotation file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{where} cannot be read as annotations ({reason}): get the data again") from error
    if source.kind == "detection":
        _require_objects(images, things, where)
    if len(images) == 0:
        raise UserError(f"{where} has no image to use: get the data again")
    # What workers share; of no images mmengine cannot make it.
    images.data_bytes, images.data_address = images._serialize_data()
    images.serialize_data = True
    return images


def _read_by_names(images, where: str):
    """Return the annotations as pycocotools reads them, and let ``images`` number the classes by their names.

    mmdet goes by the order of the categories in the file, whatever they are called.
    """
    with quiet():
        things = images.COCOAPI(where)
    numbers = {category["name"]: category["id"] for category in things.dataset["categories"]}
    things.get_cat_ids = lambda cat_names: [numbers[name] for name in cat_names if name in numbers]
    images.COCOAPI = lambda path: things
    return things


def _strict(step: dict[str, Any], classes: int) -> list:
    """Return a transform, and behind one that reads what says that it read the right thing."""
    if step["type"] == "LoadImageFromFile":
        # OpenCV, the default, reads half a JPEG file without a word; Pillow refuses it.
        return [step | {"imdecode_backend": "pillow"}]
    if step["type"] != "LoadAnnotations":
        return [step]
    # Whether label 0 is a class, which ADE20K's recipes say here, is the data set's own to say.
    kept = {key: value for key, value in step.items() if key != "reduce_zero_label"}
    return [kept, partial(_require_fitting, classes=classes)]


def _require_fitting(read: dict[str, Any], classes: int) -> dict[str, Any]:
    """Return what was read, as a transform does; UserError for annotations of another size, and for unknown labels."""
    labels, image = read.get("gt_seg_map"), read["img_path"]
    where, size = image, (read.get("height"), read.get("width"))  # a detector's annotations say them
    if labels is not None:
        where, size = read["seg_map_path"], labels.shape
        if ((labels >= classes) & (labels != IGNORED)).any():
            raise UserError(f"{where} has labels beyond its {classes} classes: get the data again")
    if tuple(size) != tuple(read["ori_shape"]):
        height, width = read["ori_shape"]
        raise UserError(
            f"{where} has annotations for another size than {width} x {height}, that of {image}: get the data again"
        )
    return read


def _require_objects(images, annotations, where: str) -> None:
    """Raise UserError for other classes, and for boxes that are not of their images."""
    del images.COCOAPI  # workers need no second copy of what was read
    expected = images.metainfo["classes"]
    if len(images.cat_ids) != len(expected):
        names = {category["name"] for category in annotations.dataset["categories"]}
        lacking = next(name for name in expected if name not in names)
        raise UserError(
            f"{where} has {len(images.cat_ids)} of {len(expected)} classes, no {lacking} among them: get the data again"
        )
    things = list(annotations.anns.values())
    outside = [
        thing for thing in things if not _is_inside(thing["bbox"], annotations.imgs.get(thing["image_id"], NOWHERE))
    ]
    if len(outside) > MOST_OUTSIDE * len(things):
        raise UserError(
            f"{where}: {len(outside)} of {len(things)} boxes lie outside of their images, one of image "
            f"{outside[0]['image_id']} among them: the annotations are of other images, get both again"
        )
    if outside:
        log.warning("%s: %d of %d boxes lie outside of their images and are left out", where, len(outside), len(things))


def _is_inside(box: Sequence[float], image: dict[str, Any]) -> bool:
    """Say whether a box, x, y, width and height in pixels, shares some of its area with its image."""
    x, y, width, height = box
    return min(x + width, image["width"]) > max(x, 0) and min(y + height, image["height"]) > max(y, 0)


class DenseBatches(Dataset):
    """From (epoch, samples) to {"inputs": [...], "data_samples": [...]}; a pure function of them, whatever the workers.

    An image whose crop holds no object is replaced by another one, as in mmdet. UserError for a damaged image.
    """

    def __init__(self, images, seed: int):
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, where: tuple[int, Sequence[int]]) -> dict[str, list]:
        epoch, chosen = where
        samples = [self.sample(epoch, int(index)) for index in chosen]
        return {name: [sample[name] for sample in samples] for name in ("inputs", "data_samples")}

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        for attempt in range(MOST_REFETCHES):
            place = index
            if attempt:
                place = int(keyed_bits(REFETCH, self.seed, epoch, index, attempt) % np.uint64(len(self)))
            with keyed_draws(TRANSFORMS, self.seed, epoch, index, attempt):
                sample = prepared(self.images, place)
            if sample is not None:
                return sample
        raise UserError(f"{MOST_REFETCHES} images in a row held no object behind the crop: look at the annotations")


def prepared(images, index: int) -> dict[str, Any] | None:
    """Return an image behind its transforms; UserError for one that is missing, damaged or of another size."""
    try:
        return images.prepare_data(index)
    except UserError:
        raise
    except Exception as error:  # the readers raise almost anything on damaged bytes
        about = images.get_data_info(index)
        parts = [about[key] for key in ("img_path", "seg_map_path") if about.get(key)]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{' with '.join(parts)} cannot be read ({reason}): get the data again") from error


class PairedBatchSampler(KeyedBatchSampler):
    """Puts images that are both wide or both tall into the same group, so that less is padded.

    mmdet's AspectRatioBatchSampler, as a function of (seed, epoch): in the order of the permutation, ``group`` images
    of one kind make up a group as soon as they are there. Image g + k G of a batch is in its group g of G.
    """

    def __init__(self, is_wide: np.ndarray, group: int, **options):
        self.is_wide, self.group = is_wide, group
        super().__init__(len(is_wide), **options)

    def order(self, epoch: int) -> np.ndarray:
        waiting, groups = {True: [], False: []}, []
        for index in super().order(epoch):
            kind = waiting[bool(self.is_wide[index])]
            kind.append(index)
            if len(kind) == self.group:
                groups.append(kind.copy())
                kind.clear()
        rest = [*waiting[False], *waiting[True]]
        groups += [rest[start : start + self.group] for start in range(0, len(rest), self.group)]
        order, size = np.concatenate(groups).astype(np.int64), self.batch_size
        whole = len(order) // size * size
        across = order[:whole].reshape(-1, size // self.group, self.group).swapaxes(1, 2).reshape(-1)
        return np.concatenate([across, order[whole:]])


def training_data(library: Library, config, cfg, cache: Path) -> TrainingData:
    """Return the training batches of a dense row; UserError for bad data and for fewer images than a batch has."""
    dense = cfg.dense
    images = open_set(library, config, cfg, "train", cache)
    size, group = dense.optim.batch_size, dense.optim.group
    if group is not None and (group < 1 or size % group):
        raise UserError(f"dense.optim.batch_size={size} is no multiple of dense.optim.group={group}: change one")
    if not 1 <= size <= len(images):
        raise UserError(f"dense.optim.batch_size={size}, but there are {len(images)} training images: set 1 to as many")
    steps = dense.steps or max(1, round(dense.epochs * (len(images) // size)))
    options = {"batch_size": size, "seed": cfg.seed, "steps": steps}
    if group is None:
        sampler = KeyedBatchSampler(len(images), **options)
    else:
        about = map(images.get_data_info, range(len(images)))
        is_wide = np.array([image["width"] >= image["height"] for image in about])
        sampler = PairedBatchSampler(is_wide, group, **options)
    return TrainingData(DenseBatches(images, cfg.seed), sampler, mixes=False, workers=cfg.trainer.workers)
