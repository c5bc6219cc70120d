"""Batches as a function of (seed, epoch), so that a resumed run and any number of ranks see the same ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler

from shared.data.keyed import keyed_permutation, keyed_uniform
from shared.data.streams import stream
from shared.errors import UserError

BALANCED, WITHIN = stream("sampler.balanced"), stream("sampler.within")


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


class ClassBalancedBatchSampler(KeyedBatchSampler):
    """Batches of ``per_class`` samples of each of batch_size / per_class drawn groups, for losses that compare samples.

    An epoch permutes the samples of every class and cuts them into groups of ``per_class``, the last one filled up with
    further views of the class's first; the groups of all classes are permuted, and then the samples of every batch, so
    that where one stands says nothing of its class. So every sample comes once an epoch, or a few times where its class
    does not divide, and a class may have two groups in a batch. ``labels``: (n,), the class of every sample.

    Raises UserError as KeyedBatchSampler, and where batch_size is not a multiple of per_class or has one group alone.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, per_class: int, seed: int, steps: int):
        if per_class < 1 or batch_size % per_class or batch_size == per_class:
            wrong = f"a batch of {batch_size} samples cannot hold two or more groups of {per_class} of a class each"
            raise UserError(f"{wrong}: set optim.batch_size to a multiple of data.per_class")
        self.per_class, self.samples = per_class, len(labels)
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        groups = sum(-(-len(members) // per_class) for members in self.members)
        super().__init__(groups * per_class, batch_size, seed, steps)

    def order(self, epoch: int) -> np.ndarray:
        groups = []
        for number, members in enumerate(self.members):
            shuffled = members[keyed_permutation(len(members), BALANCED, self.seed, epoch, number)]
            place = np.arange(-(-len(members) // self.per_class) * self.per_class)
            view, position = np.divmod(place, len(members))
            groups.append((shuffled[position] + view * self.samples).reshape(-1, self.per_class))
        groups = np.concatenate(groups)  # (groups, per_class)
        order = groups[keyed_permutation(len(groups), self.seed, epoch)].ravel()
        whole = order[: len(order) // self.batch_size * self.batch_size]
        batches = whole.reshape(-1, self.batch_size)
        draws = keyed_uniform(WITHIN, self.seed, epoch, *np.ogrid[: len(batches), : self.batch_size])
        whole[:] = np.take_along_axis(batches, draws.argsort(1, kind="stable"), 1).ravel()
        return order
