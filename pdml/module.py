"""PDML's training step and the batches that feed it.

Every labelled training pixel inside a patch is a training sample (arXiv 2211.08349, abstract). The labels of all
other pixels are masked before anything sees them; their spectra stay visible in the patches.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pdml.config import OptimConfig
from pdml.model import PatchModel
from pdml.patches import PatchSource, augment
from pdml.scenes import Scene, Split
from shared.data.keyed import keyed_bits, stream
from shared.training.guard import GuardedModule
from shared.training.ranks import gather_rows, with_global_batchnorm

AUGMENTATION = stream("pdml.augmentation")
PIXEL = stream("pdml.pixel")


class PatchBatch(NamedTuple):
    """Patches (B, bands, p, p) float32, labels (B, p, p) int64 with 0 = masked, keys (B, p, p) int64."""

    patches: Tensor
    labels: Tensor
    keys: Tensor


class PatchBatches(Dataset):
    """From (epoch, indices of training pixels) to a PatchBatch; a pure function of them and of the seed."""

    def __init__(self, scene: Scene, split: Split, patch_size: int, seed: int):
        self.source, self.patch_size, self.seed = PatchSource(scene.cube, patch_size), patch_size, seed
        self.labels = np.where(split.train, scene.labels, 0).astype(np.int64)
        self.rows, self.columns = np.nonzero(split.train)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: tuple[int, list[int]]) -> PatchBatch:
        epoch, indices = batch
        index = np.asarray(indices)
        rows, columns = self.rows[index], self.columns[index]
        patches, labels = augment(
            self.source.gather(rows, columns),
            self.source.gather_map(self.labels, rows, columns),
            (AUGMENTATION, self.seed, epoch, index),
        )
        return PatchBatch(patches, labels, self._keys(epoch, index))

    def _keys(self, epoch: int, index: np.ndarray) -> Tensor:
        """Return a random number per pixel of each patch, negative at the centre, which is always drawn."""
        pixel = np.arange(self.patch_size**2)
        bits = keyed_bits(PIXEL, self.seed, epoch, index[:, None], pixel[None]) >> np.uint64(2)
        keys = bits.astype(np.int64)
        keys[:, len(pixel) // 2] -= 1 << 62
        return torch.from_numpy(keys.reshape(len(index), self.patch_size, self.patch_size))


class PDMLModule(GuardedModule):
    """Trains any PatchModel: gather the labelled pixels of all ranks, one loss over all of them."""

    def __init__(self, model: PatchModel, optim: OptimConfig, total_steps: int):
        super().__init__()
        self.model, self.optim, self.total_steps = model, optim, total_steps
        self.labelled_pixels = 0  # of the last batch

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            self.model = with_global_batchnorm(self.model)

    def training_step(self, batch: PatchBatch, batch_idx: int) -> Tensor:
        self.last_loss = loss = self.loss(batch, batch_idx)
        self.log_dict({"loss": loss.detach(), "labelled_pixels": float(self.labelled_pixels)}, prog_bar=True)
        return loss

    def loss(self, batch: PatchBatch, step: int) -> Tensor:
        """Return the loss, 0-d, over the labelled pixels of all ranks."""
        rows, chosen = self.model.rows(batch.patches, batch.labels)
        rows = gather_rows(rows)
        labels = gather_rows(batch.labels[chosen]) - 1  # 0 was "masked", classes begin at 1
        keys = gather_rows(batch.keys[chosen])
        self.labelled_pixels = len(labels)
        return self.model.loss(rows, labels, keys)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.optim.lr, weight_decay=self.optim.weight_decay, foreach=True
        )
        # The schedule divides by its warm-up steps less one, so a short training warms up for two.
        warmup = max(self.optim.warmup, 2 / max(self.total_steps, 3))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.optim.lr, total_steps=self.total_steps, pct_start=warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
