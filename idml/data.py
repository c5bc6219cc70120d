"""The images of a run: which classes train, which are held out of training to choose an epoch, and which test."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from idml.config import IDMLConfig
from idml.sampler import ClassBalancedBatchSampler
from idml.sets import load_retrieval_set
from shared.data.augment import Augmentation, AugmentationConfig
from shared.data.images import KEPT_BYTES, Batches, ImageSet, OrderedBatches
from shared.data.keyed import keyed_permutation, stream
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.training.fit import TrainingData

HELD_OUT = stream("idml.held_out")


class ClassSubset(ImageSet):
    """The images of some classes of a set, numbered anew from 0 in the order of the old numbers."""

    def __init__(self, images: ImageSet, classes: Sequence[int]):
        kept = np.asarray(sorted(classes), np.int64)
        self.source, self.positions = images, np.flatnonzero(np.isin(images.labels, kept))
        labels = np.searchsorted(kept, images.labels[self.positions])
        super().__init__(tuple(images.classes[number] for number in kept), labels)

    def image(self, index: int) -> Tensor:
        return self.source.image(self.positions[index])

    def batch(self, indices: np.ndarray) -> Tensor | list[Tensor]:
        return self.source.batch(self.positions[indices])


def held_out_classes(classes: int, part: float) -> list[int]:
    """Return the numbers of the training classes that do not train, the same for every seed; UserError for a bad part.

    ``part``: of the classes, 0 for none; at least two of either kind.
    """
    count = round(classes * part)
    if not 0 <= part < 1 or (part > 0 and not 2 <= count <= classes - 2):
        raise UserError(
            f"data.held_out={part} of {classes} classes: set 0, or a part that leaves two classes on either side"
        )
    return sorted(keyed_permutation(classes, HELD_OUT)[:count].tolist())


def training_images(cfg: IDMLConfig) -> tuple[ImageSet, ImageSet | None]:
    """Return the images that train and those of the held-out classes (None where there are none)."""
    images = load_retrieval_set(cfg.data.manifest, "train", cfg.paths.data_root)
    held_out = held_out_classes(len(images.classes), cfg.data.held_out)
    if not held_out:
        return images, None
    kept = sorted(set(range(len(images.classes))) - set(held_out))
    return ClassSubset(images, kept), ClassSubset(images, held_out)


def training_data(cfg: IDMLConfig, images: ImageSet) -> TrainingData:
    """Return the training batches of a config; UserError for a batch that the images do not fill."""
    if cfg.scale.epochs < 1:
        raise UserError(f"scale.epochs={cfg.scale.epochs} trains nothing: give 1 or more")
    batches = Batches(images, Augmentation(cfg.augment), cfg.seed)
    size, steps = cfg.optim.batch_size, 1
    if cfg.data.per_class is None:
        sampler = KeyedBatchSampler(len(batches), size, cfg.seed, steps)
    else:
        sampler = ClassBalancedBatchSampler(images.labels, size, cfg.data.per_class, cfg.seed, steps)
    sampler.steps = cfg.scale.epochs * (sampler.length // size)
    return TrainingData(batches, sampler, mixes=False, workers=cfg.trainer.workers)  # pairs may lie on two ranks


class EvaluationBatches(OrderedBatches):
    """The images of a set in order, ``size`` at a time: a batch by its number.

    They are the same whenever they are asked for: a small set is kept as it is prepared.
    """

    def __init__(self, images: ImageSet, augment: AugmentationConfig, size: int):
        # Without a seed: nothing is drawn where nothing trains.
        super().__init__(Batches(images, Augmentation(augment), seed=0, train=False), size)
        small = len(images) * 3 * 4 * augment.image_size**2 <= KEPT_BYTES
        self.kept: dict[int, dict[str, Tensor]] | None = {} if small else None

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if self.kept is None:
            return super().__getitem__(number)
        if number not in self.kept:
            self.kept[number] = super().__getitem__(number)
        return self.kept[number]


def evaluation_batches(cfg: IDMLConfig, images: ImageSet) -> EvaluationBatches:
    """Return the batches in which a run scores a set."""
    return EvaluationBatches(images, cfg.augment, cfg.output.batch_size)
