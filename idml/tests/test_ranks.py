"""Two gloo ranks give the loss, the weights and the scores of one process, whatever the loss.

Tolerance 1e-10 relative, in float64: the ranks add the same numbers in another order.
"""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from idml.losses import BUILDERS
from idml.tests.small import INTROSPECTIVE, small_config
from idml.train import prepare
from shared.errors import UserError
from shared.run.tests.gloo import on_ranks

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
STEPS = 3


class Step(torch.nn.Module):
    """`RetrievalModule.loss` as the forward of a module, for DistributedDataParallel to wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch, step):
        return self.module.loss(batch, step)


def train(rank: int, ranks: int, folder: str, overrides: list[str]) -> dict:
    cfg = small_config(folder, *overrides, "optim.precision=64-true")
    module, data, _ = prepare(cfg)
    module = module.double().train()
    data.sampler.rank, data.sampler.world_size = rank, ranks
    step = Step(module)
    if ranks > 1:
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for number, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        batch["images"] = batch["images"].double()
        if hasattr(module.metric_loss.miner, "seed_step"):
            module.metric_loss.miner.seed_step(number)
        loss = step(batch, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    weights = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    return {"weights": weights, "losses": torch.stack(losses)}


def cases() -> dict[str, list[str]]:
    drawn = ["data.per_class=4"]
    return {name: [*INTROSPECTIVE, *drawn, f"loss={name}"] for name in BUILDERS} | {
        "unequal": ["optim.batch_size=31"],
        "released": ["metric=released", "objective=mixup"],
    }


def train_all(rank: int, ranks: int, folder: str) -> dict:
    # One start of the processes for all cases: they spend most of their time importing.
    return {name: train(rank, ranks, folder, overrides) for name, overrides in cases().items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, train_all, folder, 2, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_two_ranks_equal_one_process(case, two, tmp_path):
    one = train(0, 1, str(tmp_path), cases()[case])
    for found in (both[case] for both in two):
        torch.testing.assert_close(found["losses"], one["losses"], **CLOSE)
        for name, value in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, **CLOSE, msg=name)


def test_batch_that_ranks_cannot_mix_alike_is_refused(tmp_path):
    _, data, _ = prepare(small_config(tmp_path, *INTROSPECTIVE, "optim.batch_size=30"))
    data.require_equal_pairs(3)
    with pytest.raises(UserError, match="optim.batch_size.*multiple of 4"):
        data.require_equal_pairs(2)
