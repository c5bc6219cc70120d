"""A contract's training as one of several gloo ranks, without a Trainer."""

from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from shared.testing.contract import Contract


class _Step(torch.nn.Module):
    """The losses of a module as the forward of one, for DistributedDataParallel to wrap."""

    def __init__(self, module, losses: Callable):
        super().__init__()
        self.module, self.losses = module, losses

    def forward(self, batch, number: int):
        return self.losses(self.module, batch, number)


def train_case(rank: int, ranks: int, contract: Contract, folder, case: str, steps: int = 3) -> dict:
    """Train a case of a contract in float64 as one of several ranks; returns weights, losses and labelled counts."""
    cfg = contract.config(folder, *contract.rank_cases[case], "optim.precision=64-true")
    training = contract.prepare(cfg, folder)
    module, data = training.module.double().train(), training.data
    data.sampler.share(rank, ranks)
    step = _Step(module, contract.losses)
    if ranks > 1:
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=contract.rate)
    counts, losses = [], []
    for number, batch in zip(range(steps), data.train_dataloader(), strict=False):
        counts.append(contract.labelled(batch))
        values = step(tree_map(lambda part: part.double() if part.is_floating_point() else part, batch), number)
        optimizer.zero_grad()
        values[0].backward()
        optimizer.step()
        contract.after_step(module)
        losses.append(values.detach())
    weights = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    return {"weights": weights, "counts": counts, "losses": torch.stack(losses)}


def train_cases(rank: int, ranks: int, contract: Contract, folder) -> dict[str, dict]:
    """Train all cases of a contract: starting processes takes longer than any of them."""
    return {case: train_case(rank, ranks, contract, folder, case) for case in contract.rank_cases}
