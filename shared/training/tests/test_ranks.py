"""Two gloo ranks against one process, in float64.

Tolerance 1e-10 relative: the ranks add the same numbers in another order, nothing else may differ.
"""

import copy

import torch
from torch import nn

from shared.errors import UserError
from shared.testing.gloo import on_ranks
from shared.training.guard import GuardedModule
from shared.training.ranks import GlobalBatchNorm, gather_rows, with_global_batchnorm

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
UNEQUAL = ([0, 1, 2, 3, 4], [5, 6])  # the samples of each rank


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()


def samples() -> torch.Tensor:
    return 3 + torch.randn(7, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pair_loss(rows: torch.Tensor) -> torch.Tensor:
    """A loss that no sum over ranks can give: every pair of samples enters it."""
    return (rows[:, None] - rows[None]).square().mean().log()


def train_on_rank(rank: int) -> dict:
    model = with_global_batchnorm(network())
    rows = model(samples()[UNEQUAL[rank]]).mean((2, 3))
    loss = pair_loss(gather_rows(rows))
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():  # what DistributedDataParallel does
        torch.distributed.all_reduce(parameter.grad)
        gradients[name] = parameter.grad / torch.distributed.get_world_size()
    return {"loss": loss.detach(), "gradients": gradients, "buffers": dict(model.named_buffers())}


def test_two_ranks_with_unequal_samples_equal_one_process(tmp_path):
    model = network()
    loss = pair_loss(model(samples()).mean((2, 3)))
    loss.backward()
    for result in on_ranks(2, train_on_rank, tmp_path):
        torch.testing.assert_close(result["loss"], loss.detach(), **CLOSE)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["gradients"][name], parameter.grad, **CLOSE)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer, **CLOSE)


def half_on_rank(rank: int) -> dict:
    norm, rows = with_global_batchnorm(nn.BatchNorm2d(2)), samples().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(rows[UNEQUAL[rank]])
    (output.float() ** 3).sum().backward()
    return {"dtype": output.dtype, "buffers": dict(norm.named_buffers()), "gradient": rows.grad}


def test_statistics_of_half_precision_are_summed_in_float32(tmp_path):
    norm, rows = nn.BatchNorm2d(2), samples().bfloat16().requires_grad_()
    output = norm(rows)
    (output.float() ** 3).sum().backward()
    ranks = on_ranks(2, half_on_rank, tmp_path)
    for result in ranks:
        assert result["dtype"] == torch.bfloat16
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer)
    gradient = sum(result["gradient"].float() for result in ranks)
    torch.testing.assert_close(gradient, rows.grad.float(), rtol=0.02, atol=0.02)  # bfloat16 has eight bits


def gather_on_rank(rank: int) -> torch.Tensor:
    return gather_rows(torch.arange(2 * rank))


def test_a_rank_without_rows_takes_part_in_a_gather(tmp_path):
    assert [part.tolist() for part in on_ranks(2, gather_on_rank, tmp_path)] == [[0, 1], [0, 1]]


def test_global_batchnorm_is_batchnorm_where_there_is_one_process():
    plain, both = nn.BatchNorm2d(4).double(), samples().repeat(1, 2, 1, 1)
    swapped = with_global_batchnorm(copy.deepcopy(plain))
    assert isinstance(swapped, GlobalBatchNorm)
    for train in (True, False):
        plain.train(train), swapped.train(train)
        assert torch.equal(plain(both), swapped(both))
    assert torch.equal(plain.running_var, swapped.running_var)


def test_pytorchs_synchronised_batchnorm_trains_on_the_cpu_once_it_is_converted():
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    swapped = with_global_batchnorm(synchronised)
    assert isinstance(swapped[1], GlobalBatchNorm)
    torch.testing.assert_close(swapped(samples()), network()(samples()), **CLOSE)


def test_frozen_parameters_stay_frozen():
    frozen = with_global_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def guard_on_rank(rank: int) -> dict:
    module = Guarded()
    module.on_train_batch_start(None, 0)
    module.network[1].running_mean += 1  # what the forward of a bad batch does
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf if rank == 1 else 1.0)
    module.on_before_optimizer_step(None)
    without = all(parameter.grad is None for parameter in module.parameters())
    return {"skipped": module.step_was_skipped, "without": without, "mean": module.network[1].running_mean}


class Guarded(GuardedModule):
    def __init__(self):
        super().__init__()
        self.network = network()


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    for result in on_ranks(2, guard_on_rank, tmp_path):
        assert result["skipped"] and result["without"] and not result["mean"].any()


def diverge_on_rank(rank: int) -> dict:
    module, optimizer = Guarded(), torch.optim.SGD(network().parameters(), lr=0.5)
    for step in range(30):
        module.on_train_batch_start(None, step)
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if step > 4 and rank == step % 2 else 1.0)
        try:
            module.on_before_optimizer_step(optimizer)
        except UserError as error:
            return {"step": step, "sentence": str(error)}
    return {"step": None, "sentence": ""}


def test_a_training_that_diverged_stops_on_all_ranks_at_the_same_step_with_the_same_sentence(tmp_path):
    first, second = on_ranks(2, diverge_on_rank, tmp_path)
    assert first == second and first["step"] == 14
    assert "10 of 15 steps" in first["sentence"] and "learning rate 0.5" in first["sentence"]
