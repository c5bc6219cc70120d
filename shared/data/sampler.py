"""Batches as a function of (seed, epoch), so that a resumed run and any number of ranks see the same ones."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from shared.data.keyed import keyed_permutation
from shared.errors import UserError


class KeyedBatchSampler(Sampler[tuple[int, list[int]]]):
    """Yields (epoch, indices of this rank's part of a batch); the last, incomplete batch of an epoch is dropped.

    Give it to a DataLoader as ``sampler`` with ``batch_size=None``: Lightning then calls ``set_epoch``. The
    global batch is the same for every number of ranks; rank r takes its elements r, r + world_size, ...

    Raises UserError where there are fewer elements than one batch, or fewer elements in a batch than ranks.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if length < batch_size:
            raise UserError(
                f"{length} training samples do not fill one batch of {batch_size}: lower optim.batch_size"
            )
        if batch_size < world_size:
            raise UserError(
                f"a batch of {batch_size} cannot be shared by {world_size} ranks: use fewer ranks"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first_batch = 0, 0

    def __len__(self) -> int:
        return self.length // self.batch_size

    def resume_at(self, epoch: int, batch: int) -> None:
        """Skip the first ``batch`` batches of ``epoch``, which a checkpoint says are consumed."""
        self.epoch, self.first_batch = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch`` from its beginning, unless it is the one that ``resume_at`` named."""
        if epoch != self.epoch:
            self.epoch, self.first_batch = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch = self.epoch
        order = keyed_permutation(self.length, self.seed, epoch)
        for batch in range(self.first_batch, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield epoch, chosen[self.rank :: self.world_size].tolist()
