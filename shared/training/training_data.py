"""The batches of a training as Lightning takes them, for any number of ranks and past any interruption."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError


class TrainingData(pl.LightningDataModule):
    """The training batches; one sampler that resumption can move."""

    def __init__(self, batches, sampler: KeyedBatchSampler, mixes: bool, workers: int = 0):
        super().__init__()
        self.batches, self.sampler, self.mixes, self.workers = batches, sampler, mixes, workers

    def require_equal_pairs(self, ranks: int) -> None:
        """Raise UserError where ``ranks`` would mix other pairs of images than one process does."""
        size = self.sampler.batch_size
        if self.mixes and ranks > 1 and size % (2 * ranks):
            raise UserError(
                f"a batch of {size} mixed images cannot be shared by {ranks} ranks: set optim.batch_size to a "
                f"multiple of {2 * ranks}"
            )

    def setup(self, stage: str) -> None:
        self.require_equal_pairs(self.trainer.world_size)
        self.sampler.share(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader:
        # A generator of its own: a loader otherwise draws from torch's global one at every epoch.
        return DataLoader(
            self.batches,
            sampler=self.sampler,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
        )
