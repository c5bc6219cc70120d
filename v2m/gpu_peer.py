"""mamba-ssm's CUDA scan as the measure of ``gpu_evidence``: where it comes from, and how V2M's release calls it.

It is the extension that mamba-ssm installs, or its source (``csrc/selective_scan`` of github.com/state-spaces/mamba)
compiled for this GPU alone, into torch's extension cache; that needs nvcc and ninja. It scans sequences, so rows and
columns come to it as copies (sequences, channels, steps), made before anything is timed.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import UserError
from v2m.kernels.scan2d.reference import by_axis, returned, turned
from v2m.mixer import ReleasedMixer


def load(source: Path | None):
    """Return mamba-ssm's CUDA extension, installed or compiled from its source folder; None without either."""
    if source is not None:
        from torch.utils.cpp_extension import load as compiled

        folder = source / "csrc" / "selective_scan"
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing: give the folder of mamba-ssm's source with --mamba-ssm-source"
            )
        os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
        files = [str(path) for path in (*folder.glob("*.cpp"), *folder.glob("*.cu"))]
        flags = ["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
        flags += [f"-U__CUDA_NO_{kind}_OPERATORS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162", "HALF2")]
        flags += [f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162")]
        return compiled(
            "selective_scan_cuda", files, extra_include_paths=[str(folder)], extra_cuda_cflags=flags
        )
    try:
        import selective_scan_cuda
    except ImportError:
        return None
    return selective_scan_cuda


def load_or_reason(source: Path | None):
    """Return mamba-ssm's extension, or in words why there is none."""
    try:
        return load(source) or "not installed, and no source folder was given"
    except UserError:
        raise
    except Exception as error:  # a compiler's, of any kind
        return f"could not be built: {' '.join(str(error).split())[-300:]}"


class PeerScan(torch.autograd.Function):
    """mamba-ssm's scan with softplus and bias, without a gate: (M, D, L) -> (M, D, L).

    u, delta (M, D, L); A (D, N); B and C (M, 1, N, L), or (D, N) where fixed, in A's type; D (D,) or None; bias (D,).
    """

    @staticmethod
    def forward(ctx, extension, *arguments: Tensor | None) -> Tensor:
        *scanned, bias = arguments
        y, states, *_ = extension.fwd(*scanned, None, bias, True)
        ctx.extension = extension
        ctx.save_for_backward(*arguments, states)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        *scanned, bias, states = ctx.saved_tensors
        given = (*scanned, None, bias, dy.contiguous(), states, None, None, True, False)
        du, ddelta, dA, dB, dC, dD, dbias, *_ = ctx.extension.bwd(*given)
        return None, du, ddelta, dA, dB, dC, None if scanned[-1] is None else dD, dbias


class PassCalls:
    """One pass over a grid as calls of mamba-ssm's scan; A and the bias are those of group 0, the others have the same.

    arguments: those of ``scan2d`` by name, all directions along one axis.
    """

    def __init__(
        self, extension, arguments: dict[str, Tensor | None], dy: Tensor, directions: tuple[str, ...]
    ):
        ((self.axis, _, self.back),) = by_axis(directions)
        self.extension, self.grid = extension, arguments["u"].shape
        self.u = self._sequences(arguments["u"])
        self.given = [self.u, self._sequences(arguments["delta"]), arguments["A"][0]]
        for matrix in (arguments["B"], arguments["C"]):
            ones = torch.ones_like(arguments["A"][0])
            self.given.append(ones if matrix is None else self._sequences(matrix)[:, None])
        self.given += [None, None, arguments["delta_bias"][0]]  # no skip, no gate
        self.dy = self._sequences(dy)
        self.y, self.states, *_ = self.forward()

    def _sequences(self, tensor: Tensor) -> Tensor:
        """(batch, K, ., H, W) -> (batch x K x lines, ., steps), each in the order of its scan."""
        lines = turned(tensor, self.axis, self.back)  # (batch, K, ., lines, steps)
        return lines.transpose(2, 3).flatten(0, 2).contiguous()

    def forward(self) -> list[Tensor]:
        """Run the scan; return y and the states it keeps."""
        return self.extension.fwd(*self.given, True)

    def backward(self) -> list[Tensor]:
        """Return all gradients, also those to the constant, which the scan always makes."""
        return self.extension.bwd(*self.given, self.dy, self.states, None, None, True, False)

    def output(self) -> Tensor:
        """Return y as ``scan2d`` gives it."""
        batch, groups, width = self.grid[:3]
        lines = self.y.unflatten(0, (batch, groups, -1)).transpose(2, 3)
        return returned(lines, self.axis, self.back)


class ReleasedOnPeer(ReleasedMixer):
    """``ReleasedMixer`` whose sequences mamba-ssm scans, channels before steps as in the release from end to end.

    For ``released_composition`` alone: a pass takes sequences (M, 1, 1, L, D). The short convolution is PyTorch's.
    """

    def __init__(self, extension, embed_dim: int, **options):
        super().__init__(embed_dim, **options)
        self.extension = extension

    def run_pass(
        self, sources: Tensor, directions: Sequence[str], suffixes: Sequence[str], chosen: Sequence[str]
    ):
        (suffix,) = suffixes
        conv, project, step = (getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        tokens = sources[:, 0, 0]  # (M, L, D)
        count, length, width = tokens.shape
        u = F.conv1d(
            tokens.transpose(1, 2), conv.weight, conv.bias, padding=self.conv_kernel - 1, groups=width
        )
        u = F.silu(u[..., :length])
        selected = project(u.transpose(1, 2).reshape(-1, width))  # (M L, R + N)
        delta = (step.weight @ selected[:, : self.rank].t()).unflatten(1, (count, length)).transpose(0, 1)
        matrix = selected[:, self.rank :].unflatten(0, (count, 1, length)).transpose(2, 3).contiguous()
        A = -torch.exp(getattr(self, f"A{suffix}_log").float())
        ones = torch.ones_like(A)
        B, C = (matrix if name in chosen else ones for name in ("B", "C"))
        D = getattr(self, f"D{suffix}").float()
        y = PeerScan.apply(self.extension, u.contiguous(), delta, A, B, C, D, step.bias.float())
        return y.transpose(1, 2)[:, None, None]
