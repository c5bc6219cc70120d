"""Two gloo ranks, of unequal parts of a batch or with mixed images, give the weights of one process.

Tolerance 1e-10 relative, in float64: the ranks add the same numbers in another order. No drop path, which every
rank draws for itself.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from globalmamba.tests.small import small_config
from globalmamba.train import prepare
from shared.claims.compose import repository_root
from shared.errors import UserError
from shared.testing.gloo import on_ranks
from shared.training.record import read_record

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
STEPS = 3
MIXED = ["augment.mixup_alpha=0.8", "augment.cutmix_alpha=1.0", "optim.batch_size=8"]
UNEQUAL = ["optim.batch_size=7"]
CASES = {"mixed": MIXED, "unequal": UNEQUAL}


class Step(torch.nn.Module):
    """`ClassificationModule.loss` as the forward of a module, for DistributedDataParallel to wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch, step):
        return self.module.loss(batch, step)


def train(rank: int, ranks: int, folder: str, overrides: list[str]) -> dict:
    cfg = small_config(folder, *overrides, "optim.precision=64-true")
    module, data = prepare(cfg)
    module = module.double()
    data.sampler.rank, data.sampler.world_size = rank, ranks
    step = Step(module)
    if ranks > 1:
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(module.model.parameters(), lr=0.1)
    counts, losses = [], []
    for number, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        batch["images"] = batch["images"].double()
        counts.append(len(batch["labels"]))
        loss = step(batch, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.update_average()
        losses.append(loss.detach())
    weights = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    return {"weights": weights, "counts": counts, "losses": torch.stack(losses)}


def train_both(rank: int, ranks: int, folder: str) -> dict:
    # One start of the processes for both cases: they spend most of their time importing.
    return {name: train(rank, ranks, folder, overrides) for name, overrides in CASES.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, train_both, folder, 2, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case, two, tmp_path):
    one = train(0, 1, str(tmp_path), CASES[case])
    both = [found[case] for found in two]
    assert [sum(pair) for pair in zip(*(found["counts"] for found in both), strict=True)] == one["counts"]
    # Every rank's loss carries the factor that undoes the averaging, so their mean is the loss.
    mean = (both[0]["losses"] + both[1]["losses"]) / 2
    torch.testing.assert_close(mean, one["losses"], **CLOSE)
    for found in both:
        for name, value in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, **CLOSE, msg=name)


def test_batch_that_ranks_cannot_mix_alike_is_refused(tmp_path):
    _, data = prepare(small_config(tmp_path, "augment.mixup_alpha=0.8", "optim.batch_size=6"))
    data.require_equal_pairs(3)
    with pytest.raises(UserError, match="optim.batch_size.*multiple of 4"):
        data.require_equal_pairs(2)


def test_any_batch_may_be_shared_where_nothing_is_mixed(tmp_path):
    _, data = prepare(small_config(tmp_path, "augment.mixup_alpha=0.0", "augment.cutmix_alpha=0.0", *UNEQUAL))
    for ranks in (2, 3, 4):
        data.require_equal_pairs(ranks)  # raises where a batch must not be shared so


def reproduce(folder, *overrides) -> subprocess.CompletedProcess:
    """Run the digits through the command line, in float64 on the CPU."""
    command = [
        sys.executable,
        "-m",
        "shared.run",
        "reproduce",
        "globalmamba",
        "--rows",
        "digits-gm",
        "--seeds",
        "0",
    ]
    command += [
        "--results",
        str(folder),
        "trainer.accelerator=cpu",
        "scale.epochs=0.2",
        "optim.precision=64-true",
    ]
    return subprocess.run([*command, *overrides], cwd=repository_root(), capture_output=True, text=True)


@pytest.mark.slow
def test_two_devices_on_the_command_line_give_the_record_of_one(tmp_path):
    found = []
    for devices, strategy in (("1", "auto"), ("2", "ddp")):
        done = reproduce(tmp_path / devices, f"trainer.devices={devices}", f"trainer.strategy={strategy}")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(read_record(tmp_path / devices / "globalmamba/demo/digits-gm/seed0.json"))
    one, two = found
    assert two.config_sha256 == one.config_sha256
    for name in ("top1", "top5", "loss", "train_images", "parameters"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], rel=1e-9), name


@pytest.mark.slow
def test_bad_input_in_one_of_two_devices_is_one_sentence_and_code_2(tmp_path):
    mixed = ("augment.mixup_alpha=0.8", "optim.batch_size=30", "trainer.devices=2", "trainer.strategy=ddp")
    done = reproduce(tmp_path, *mixed)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "set optim.batch_size to a multiple of 4" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("globalmamba/demo/**/*.json"))
