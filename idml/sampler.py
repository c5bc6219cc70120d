"""Class-balanced batches, for losses that compare the samples of a batch; a function of (seed, epoch)."""

import numpy as np

from shared.data.keyed import keyed_permutation, keyed_uniform, stream
from shared.data.sampler import KeyedBatchSampler
from shared.errors import UserError

BALANCED, WITHIN = stream("idml.balanced"), stream("idml.within")


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
