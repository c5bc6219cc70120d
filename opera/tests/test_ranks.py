"""Two gloo ranks give the loss, the gradients, the statistics and the momentum encoder of one process.

Tolerance 1e-10 relative, in float64: the ranks add the same numbers in another order.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from opera.hierarchy import ARRANGEMENTS
from opera.tests.small import small_config
from opera.train import measured_conflict, prepare
from shared.claims.compose import repository_root
from shared.testing.gloo import on_ranks
from shared.training.record import read_record

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


def cosine(folder: str) -> float:
    """Return the measured conflict, of parts of a batch that are unequal where there are two ranks."""
    cfg = small_config(folder, "optim.batch_size=31")
    module, data = prepare(cfg)
    return measured_conflict(cfg, module.double(), data)


def all_cases(rank: int, ranks: int, folder: str) -> dict:
    # One start of the processes for all cases: they spend most of their time importing.
    found = {name: steps(rank, ranks, folder, overrides) for name, overrides in cases().items()}
    return found | {"cosine": cosine(folder)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, all_cases, folder, 2, str(folder))


@pytest.mark.slow
def test_two_ranks_measure_the_conflict_of_one_process(two, tmp_path):
    one = cosine(str(tmp_path))
    assert 0.01 < abs(one) < 1
    assert [found["cosine"] for found in two] == pytest.approx([one, one], rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases())
def test_two_ranks_equal_one_process(case, two, tmp_path):
    one = steps(0, 1, str(tmp_path), cases()[case])
    for found in (both[case] for both in two):
        torch.testing.assert_close(found["losses"], one["losses"], **CLOSE)
        for name, value in one["state"].items():
            torch.testing.assert_close(found["state"][name], value, msg=name, **CLOSE)


def reproduce(folder, *overrides: str) -> subprocess.CompletedProcess:
    """Run the digits through the command line, in float64 on the CPU."""
    command = f"-m shared.run reproduce opera --rows digits-opera --seeds 0 --results {folder} scale.epochs=2"
    options = ["trainer.accelerator=cpu", "optim.precision=64-true", "task.epochs=2", *overrides]
    return subprocess.run(
        [sys.executable, *command.split(), *options], cwd=repository_root(), capture_output=True, text=True
    )


@pytest.mark.slow
def test_two_devices_on_the_command_line_give_the_record_of_one(tmp_path):
    found = []
    for devices, strategy in (("1", "auto"), ("2", "ddp")):
        done = reproduce(tmp_path / devices, f"trainer.devices={devices}", f"trainer.strategy={strategy}")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(read_record(tmp_path / devices / "opera/demo/digits-opera/seed0.json"))
    one, two = found
    assert two.config_sha256 == one.config_sha256
    assert {"top1", "top5", "top1_knn", "gradient_cosine"} <= set(one.metrics)
    for name, value in one.metrics.items():
        if name != "pretrain_seconds":
            assert two.metrics[name] == pytest.approx(value, rel=1e-8), name
