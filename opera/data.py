"""The images of a pre-training: which ones, in what order, and whose labels are seen."""

from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.v2.functional as transforms
from torch import Tensor
from torch.utils.data import Dataset

from opera.config import OPERAConfig
from opera.hierarchy import UNLABELLED
from opera.sets import load_classification_set
from opera.views import Views
from shared.data.images import ImageSet, keyed_subset
from shared.data.keyed import keyed_permutation, stream
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.training.fit import TrainingData

LABELLED = stream("opera.labelled")


def seen_labels(labels: np.ndarray, part: float, seed: int) -> np.ndarray:
    """Return the labels (n,) int64 of which only a part of every class is seen, the others -1; a function of the seed.

    Raises UserError for a part outside [0, 1].
    """
    if not 0 <= part <= 1:
        raise UserError(f"data.labelled={part} is no part of the images: set 0 to 1")
    seen = np.full_like(labels, UNLABELLED)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn = members[keyed_permutation(len(members), LABELLED, seed, int(label))]
        seen[drawn[: round(part * len(members))]] = label
    return seen


class PretrainingBatches(Dataset):
    """From (epoch, samples) to a batch; a pure function of them, whatever the workers.

    ``samples`` count through ``chosen``. The result: labels (b,) int64, -1 where not seen, indices (b,) int64 into the
    set, epoch (0-d), and either images uint8 (b, 3, H, W), from which the views are cut on the device, or, where the
    images of the set differ in size, first and second, uint8 (b, 3, S, S), the crops of both views.
    """

    def __init__(self, images: ImageSet, labels: np.ndarray, views: Views, seed: int, chosen: np.ndarray):
        self.images, self.labels, self.views, self.seed, self.chosen = images, labels, views, seed, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, batch: tuple[int, Sequence[int]]) -> dict[str, Tensor]:
        epoch, samples = batch
        index = self.chosen[np.asarray(samples, np.int64)]
        images = self.images.batch(index)
        fields = {"labels": self.labels[index], "indices": index, "epoch": np.int64(epoch)}
        fields = {name: torch.as_tensor(value) for name, value in fields.items()}
        if isinstance(images, Tensor):
            return fields | {"images": images}
        size = [self.views.cfg.image_size] * 2
        for view, name in enumerate(("first", "second")):
            heights, widths = ([image.shape[axis] for image in images] for axis in (-2, -1))
            boxes = self.views.boxes(heights, widths, (self.seed, epoch, index, view)).tolist()
            crops = [
                transforms.resized_crop(image, *box, size, antialias=True)
                for image, box in zip(images, boxes, strict=True)
            ]
            fields[name] = torch.stack(crops)
        return fields


def pretraining_data(cfg: OPERAConfig) -> TrainingData:
    """Return the batches of a pre-training; UserError for missing data and for fewer images than a batch has.

    ``data.train_images`` draws that many by the seed, of every class alike.
    """
    images = load_classification_set(cfg.data.manifest, "train", cfg.paths.data_root)
    if cfg.data.classes != len(images.classes):
        raise UserError(
            f"{cfg.data.manifest} has {len(images.classes)} classes and data.classes={cfg.data.classes}: set "
            f"data.classes={len(images.classes)}"
        )
    chosen = np.arange(len(images))
    if cfg.data.train_images is not None:
        chosen = keyed_subset(images.labels, cfg.data.train_images, cfg.seed)
    labels = seen_labels(images.labels, cfg.data.labelled, cfg.seed)
    if cfg.objective.arrangement not in ("instance", "masked") and not (labels[chosen] >= 0).any():
        raise UserError(
            f"objective.arrangement={cfg.objective.arrangement} needs labels and data.labelled={cfg.data.labelled} "
            "leaves none: raise it, or choose the arrangement instance"
        )
    batches = PretrainingBatches(images, labels, Views(cfg.views), cfg.seed, chosen)
    if cfg.scale.epochs < 1:
        raise UserError(f"scale.epochs={cfg.scale.epochs} trains nothing: give 1 or more")
    sampler = KeyedBatchSampler(len(batches), cfg.optim.batch_size, cfg.seed, steps=1)
    sampler.steps = cfg.scale.epochs * (len(batches) // cfg.optim.batch_size)
    return TrainingData(batches, sampler, mixes=False, workers=cfg.trainer.workers)
