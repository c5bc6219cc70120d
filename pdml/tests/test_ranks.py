"""Two gloo ranks with unequal numbers of labelled pixels give the weights of one process.

Tolerance 1e-10 relative, in float64: the ranks add the same numbers in another order. SSRN without dropout,
because every rank draws its own masks.
"""

import torch
from torch.nn.parallel import DistributedDataParallel

from pdml.tests.small import small_config
from pdml.train import prepare
from shared.testing.gloo import on_ranks
from shared.training.ranks import gather_rows, with_global_batchnorm

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
STEPS = 3


class Step(torch.nn.Module):
    """`PDMLModule.training_step` as the forward of a module, for DistributedDataParallel to wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        module.log_dict = lambda *_, **__: None  # no Trainer here

    def forward(self, batch):
        return self.module.training_step(batch, 0)


def train(rank: int, ranks: int, folder: str) -> dict:
    cfg = small_config(folder, "model=ssrn", "model.backbone.dropout=0.0", "optim.precision=64-true")
    _, _, module, data = prepare(cfg)
    module = module.double()
    sampler = data.sampler
    sampler.rank, sampler.world_size = rank, ranks
    step = Step(module)
    if ranks > 1:
        module.model = with_global_batchnorm(module.model)
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    counts, losses = [], []
    for batch, _ in zip(data.train_dataloader(), range(STEPS), strict=False):
        batch = batch._replace(patches=batch.patches.double())
        counts.append(int((batch.labels > 0).sum()))
        loss = step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    weights = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    return {"weights": weights, "counts": counts, "losses": torch.stack(losses)}


def test_two_ranks_with_unequal_labelled_pixels_equal_one_process(tmp_path):
    one = train(0, 1, str(tmp_path))
    two = on_ranks(2, train, tmp_path, 2, str(tmp_path))
    assert two[0]["counts"] != two[1]["counts"], "the case under test is unequal counts"
    assert [sum(pair) for pair in zip(two[0]["counts"], two[1]["counts"], strict=True)] == one["counts"]
    for found in two:
        torch.testing.assert_close(found["losses"], one["losses"], **CLOSE)
        for name, value in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, **CLOSE, msg=name)


def test_gathering_with_one_process_changes_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
