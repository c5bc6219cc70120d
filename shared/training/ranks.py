"""What makes many ranks compute what one process computes.

Every rank gathers the samples that enter a loss and computes the whole loss. The backward of a gather sums
over ranks, DistributedDataParallel then averages, and the two cancel: the gradient is that of one process
on the whole batch, however unequal the ranks' numbers of labelled samples are.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather, all_reduce


def world_size() -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows_of_ranks(count: int, device: torch.device) -> list[int]:
    """Return how many rows every rank has, this one ``count``. Waits for the device where there are several ranks."""
    if world_size() == 1:
        return [count]
    return torch.cat(all_gather(torch.tensor([count], device=device))).tolist()


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Concatenate the (n_r, ...) rows of all ranks to (sum n_r, ...), differentiably; n_r may be 0 or differ.

    ``counts``: every n_r, where they are known (``rows_of_ranks``); otherwise the ranks ask each other.
    """
    if world_size() == 1:
        return rows
    counts = rows_of_ranks(len(rows), rows.device) if counts is None else counts
    padding = rows.new_zeros((max(counts) - len(rows), *rows.shape[1:]))
    parts = all_gather(torch.cat([rows, padding]).contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def rank() -> int:
    """Return the number of this rank, 0 without torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of all ranks' values of one shape, without a gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: Tensor) -> bool:
    """Return whether the 0-d boolean ``flag`` is true on any rank."""
    return bool(sum_over_ranks(flag.to(torch.int32)))


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over all ranks, on any device (PyTorch's SyncBatchNorm refuses the CPU).

    Input (N, C, ...); statistics from a differentiable all-reduce of count, sum and sum of squares about a
    common shift, in float32 where the input is of half precision, whose type the output has again. In evaluation, or
    with one rank, it is nn.BatchNorm of any dimension.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        dtype, input = input.dtype, input.to(torch.promote_types(input.dtype, torch.float32))
        axes, shape = [0, *range(2, input.dim())], [1, -1] + [1] * (input.dim() - 2)
        # Sums about a shift that all ranks share keep the variance from cancelling.
        shift = sum_over_ranks(input.mean(axes)) / world_size()
        centred = input - shift.view(shape)
        count = torch.full_like(shift[:1], input.numel() / input.shape[1])
        total = all_reduce(torch.cat([centred.sum(axes), centred.square().sum(axes), count]))
        first, second, count = total.split([len(shift), len(shift), 1])
        mean = first / count
        variance = second / count - mean.square()
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean + shift, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        output = (centred - mean.view(shape)) * scale.view(shape)
        return (output + self.bias.view(shape) if self.affine else output).to(dtype)


def with_global_batchnorm(module: nn.Module) -> nn.Module:
    """Return ``module`` with every nn.BatchNorm1d, 2d, 3d and nn.SyncBatchNorm made a GlobalBatchNorm, tensors kept."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            layer.__class__ = GlobalBatchNorm  # all that they differ in is the dimension that they check
    return module
