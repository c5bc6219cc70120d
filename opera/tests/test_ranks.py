"""Two gloo ranks give the loss, the gradients, the statistics and the momentum encoder of one process.

Tolerance 1e-10 relative, in float64: the ranks add the same numbers in another order.
"""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from opera.hierarchy import ARRANGEMENTS
from opera.tests.small import small_config
from opera.train import prepare
from shared.run.tests.gloo import on_ranks

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
STEPS = 3


class Step(torch.nn.Module):
    """The objective as the forward of a module, for DistributedDataParallel to wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        self.terms = self.module.terms(batch)
        return self.terms.total


def steps(rank: int, ranks: int, folder: str, overrides: list[str]) -> dict:
    module, data = prepare(small_config(folder, *overrides))
    module = module.double().train()
    data.sampler.rank, data.sampler.world_size = rank, ranks
    inner = Step(module)
    step = DistributedDataParallel(inner) if ranks > 1 else inner
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        total = step(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        module.model.update_momentum(0.9)
        losses.append(torch.stack([term.detach() for term in inner.terms]))
    state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    return {"state": state, "losses": torch.stack(losses)}


def cases() -> dict[str, list[str]]:
    found = {name: [f"objective.arrangement={name}"] for name in ARRANGEMENTS}
    # Unequal parts of a batch, and of the labels in it.
    return found | {"unequal": ["optim.batch_size=31"], "partly labelled": ["data.labelled=0.3"]}


def all_cases(rank: int, ranks: int, folder: str) -> dict:
    # One start of the processes for all cases: they spend most of their time importing.
    return {name: steps(rank, ranks, folder, overrides) for name, overrides in cases().items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, all_cases, folder, 2, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_two_ranks_equal_one_process(case, two, tmp_path):
    one = steps(0, 1, str(tmp_path), cases()[case])
    for found in (both[case] for both in two):
        torch.testing.assert_close(found["losses"], one["losses"], **CLOSE)
        for name, value in one["state"].items():
            torch.testing.assert_close(found["state"][name], value, msg=name, **CLOSE)
