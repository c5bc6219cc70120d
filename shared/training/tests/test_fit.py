"""What a training costs, as it is estimated from a few steps."""

import time
from types import SimpleNamespace

import pytest
import torch

from shared.data.sampler import KeyedBatchSampler
from shared.training.fit import TrainingData, seconds_of_training

LOADING, STEPS = 0.05, 100  # seconds a batch


class SlowBatches:
    def __getitem__(self, batch):  # (epoch, samples)
        time.sleep(LOADING)
        return {"x": torch.ones(len(batch[1]))}


class Quick:
    """A network whose step takes no time to speak of."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(()))

    def to(self, device):
        pass

    def configure_optimizers(self):
        return {"optimizer": torch.optim.SGD([self.weight], 0.1)}

    def loss(self, batch, step):
        return (self.weight * batch["x"]).sum()


def estimate(workers: int, steps: int = STEPS) -> float:
    trainer = SimpleNamespace(accelerator="cpu", devices=1, num_nodes=1)
    cfg = SimpleNamespace(trainer=trainer, optim=SimpleNamespace(precision="32-true"))
    data = TrainingData(SlowBatches(), KeyedBatchSampler(8, 2, 0, steps), mixes=False, workers=workers)
    return seconds_of_training(cfg, Quick(), data)


# From above only roughly: the machine may be at other work.
@pytest.mark.parametrize("workers", [0, 2])
def test_the_estimate_includes_the_loading_of_batches_shared_by_the_workers(workers):
    alone = STEPS * LOADING / max(workers, 1)
    assert alone <= estimate(workers) < 10 * alone


def test_every_step_of_a_short_training_loads_a_batch_of_its_own():
    assert estimate(0, steps=2) >= 2 * LOADING
