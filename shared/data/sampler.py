"""Batches as a function of (seed, epoch), so that a resumed run and any number of ranks see the same ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler

from shared.data.keyed import keyed_permutation
from shared.errors import UserError


@dataclass(eq=False)
class KeyedBatchSampler(Sampler[tuple[int, list[int]]]):
    """Yields ``steps`` times (epoch, indices of this rank's part of a batch), through as many epochs as it takes.

    Every epoch is a permutation of its own; its last, incomplete batch is dropped. Give the sampler to a
    DataLoader with ``batch_size=None``. To Lightning the whole training is one epoch of ``steps`` batches: it
    continues correctly inside an epoch, but counts one twice or cuts one short where a checkpoint fell on a border.
    The global batch is the same for every number of ranks; rank r takes its elements r, r + world_size, ...
    With ``repeats`` R above 1 (repeated augmentation: Hoffer et al., arXiv 1901.09335, as in DeiT) an epoch is as
    long as before and holds R views of each of ceil(1 / R) of the elements, side by side; view v of element i is
    the index i + v * length.

    Raises UserError where steps or batch size are below 1, where there are fewer elements than one batch, and
    where a batch has fewer elements than there are ranks.
    """

    length: int
    batch_size: int
    seed: int
    steps: int
    rank: int = 0
    world_size: int = 1
    repeats: int = 1
    first_step: int = field(default=0, init=False)

    def __post_init__(self):
        size = self.batch_size
        if size < 1 or self.steps < 1:
            remedy = "set scale.steps and optim.batch_size to 1 or more"
            raise UserError(f"{self.steps} steps of {size} samples: {remedy}")
        if self.length < size:
            wrong = f"{self.length} training samples do not fill one batch of {size}"
            raise UserError(f"{wrong}: lower optim.batch_size")
        self.share(self.rank, self.world_size)

    def __len__(self) -> int:
        return self.steps

    def share(self, rank: int, world_size: int) -> None:
        """Yield the part of one of several ranks from now on; UserError where a batch has fewer elements than ranks."""
        if self.batch_size < world_size:
            raise UserError(
                f"a batch of {self.batch_size} cannot be shared by {world_size} ranks: use fewer ranks, or raise "
                "optim.batch_size"
            )
        self.rank, self.world_size = rank, world_size

    def resume_at(self, step: int) -> None:
        """Skip the first ``step`` batches, which a checkpoint says are consumed."""
        self.first_step = step

    def order(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in their order, int64, as many as ``length`` or more."""
        order = keyed_permutation(self.length, self.seed, epoch)
        if self.repeats > 1:
            order = (order[:, None] + self.length * np.arange(self.repeats)).ravel()
        return order

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        batches_an_epoch, drawn = self.length // self.batch_size, None
        for step in range(self.first_step, self.steps):
            epoch, batch = divmod(step, batches_an_epoch)
            if epoch != drawn:
                order, drawn = self.order(epoch), epoch
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield epoch, chosen[self.rank :: self.world_size].tolist()
