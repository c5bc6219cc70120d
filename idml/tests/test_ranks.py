"""Two gloo ranks give the loss, the weights and the scores of one process, whatever the loss.

Tolerance 1e-10 relative, in float64: the ranks add the same numbers in another order.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from idml.losses import BUILDERS
from idml.tests.small import INTROSPECTIVE, small_config
from idml.train import prepare
from shared.claims.compose import repository_root
from shared.errors import UserError
from shared.testing.gloo import on_ranks
from shared.training.record import read_record

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


def reproduce(folder, *overrides) -> subprocess.CompletedProcess:
    """Run the digits through the command line, in float64 on the CPU."""
    command = (
        f"-m shared.run reproduce idml --rows digits-idml-pa --seeds 0 --results {folder} scale.epochs=2"
    )
    options = ["trainer.accelerator=cpu", "optim.precision=64-true", "output.pictures=false", *overrides]
    return subprocess.run(
        [sys.executable, *command.split(), *options], cwd=repository_root(), capture_output=True, text=True
    )


@pytest.mark.slow
def test_two_devices_on_the_command_line_give_the_record_of_one(tmp_path):
    found = []
    for devices, strategy in (("1", "auto"), ("2", "ddp")):
        done = reproduce(tmp_path / devices, f"trainer.devices={devices}", f"trainer.strategy={strategy}")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(read_record(tmp_path / devices / "idml/demo/digits-idml-pa/seed0.json"))
    one, two = found
    assert two.config_sha256 == one.config_sha256
    assert {"recall_at_1", "nmi", "map_at_r", "uncertainty_mean", "auroc_mixed"} <= set(one.metrics)
    for name, value in one.metrics.items():
        if name != "train_seconds":
            assert two.metrics[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.slow
def test_bad_input_in_one_of_two_devices_is_one_sentence_and_code_2(tmp_path):
    done = reproduce(tmp_path, "optim.batch_size=30", "trainer.devices=2", "trainer.strategy=ddp")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "set optim.batch_size to a multiple of 4" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("idml/demo/**/*.json"))
