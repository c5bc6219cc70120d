"""The images of a run: which ones train, in what order, and which ones test."""

from shared.data.augment import Augmentation
from shared.data.images import Batches, OrderedBatches, keyed_subset, load_image_set
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError
from shared.training.fit import TrainingData

from .schema import ClassificationConfig


def training_data(cfg: ClassificationConfig) -> TrainingData:
    """Return the training batches of a config; UserError for data that are missing or not the manifest's.

    ``data.train_images`` draws that many by the seed, of every class alike; ``augment.repeats`` views of an image
    stand in the same batch. ``scale.epochs`` may be a fraction.
    """
    images = load_image_set(cfg.data.manifest, "train", cfg.paths.data_root)
    chosen = None
    if cfg.data.train_images is not None:
        chosen = keyed_subset(images.labels, cfg.data.train_images, cfg.seed)
    batches = Batches(images, Augmentation(cfg.augment), cfg.seed, chosen=chosen)
    size = cfg.optim.batch_size
    if cfg.scale.epochs <= 0:
        raise UserError(f"scale.epochs={cfg.scale.epochs} trains nothing: give a positive number, or a fraction of one")
    steps = max(1, round(cfg.scale.epochs * (len(batches) // max(size, 1))))
    sampler = KeyedBatchSampler(len(batches), size, cfg.seed, steps, repeats=cfg.augment.repeats)
    mixes = cfg.augment.mixup_alpha > 0 or cfg.augment.cutmix_alpha > 0
    return TrainingData(batches, sampler, mixes, cfg.trainer.workers)


def evaluation_batches(cfg: ClassificationConfig, at_most: int | None = None) -> OrderedBatches:
    """Return the test images in order, ``output.batch_size`` at a time."""
    images = load_image_set(cfg.data.manifest, "test", cfg.paths.data_root)
    batches = Batches(images, Augmentation(cfg.augment), cfg.seed, train=False)
    return OrderedBatches(batches, cfg.output.batch_size, at_most)
