"""What the plain networks share: Vim's blocks, positions, head and start; tokens and mixers are arguments.

Vision Mamba, arXiv 2401.09417, section 3 and table 1 (https://github.com/hustvl/Vim): depth 24, width 192 (tiny) or 384
(small), learned absolute positions, and per block ``stream + Mixer(RMSNorm(stream))`` with the stream in float32. Names
of parameters are those of the official checkpoints.
"""

import math
from collections.abc import Callable

import torch
from timm.layers import DropPath, Mlp, lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError

DELTA_RANGE = (1e-3, 0.1)  # the time steps that a fresh network starts with, log-uniform
EMBEDDING_STD = 0.02
INITIALISATION = "mamba"  # of a network that was asked for none


def add_pass(
    mixer: nn.Module, suffix: str, *, width: int, rank: int, state_dim: int, conv_kernel: int, matrices: int = 2
) -> None:
    """Give a mixer the parameters of one selective scan under their official names, told apart by a suffix.

    A short convolution, the projections to step size (``rank``) and to B and C (``matrices`` of them), A and D.
    """
    # The mixer uses the weights; the modules give them their official names.
    mixer.add_module(f"conv1d{suffix}", nn.Conv1d(width, width, conv_kernel, groups=width))
    mixer.add_module(f"x_proj{suffix}", nn.Linear(width, rank + matrices * state_dim, bias=False))
    step = nn.Linear(rank, width)
    mixer.add_module(f"dt_proj{suffix}", step)
    A_log = torch.arange(1.0, state_dim + 1).log().repeat(width, 1)
    mixer.register_parameter(f"A{suffix}_log", nn.Parameter(A_log))
    mixer.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(width)))
    _reset_delta(step)


@torch.no_grad()
def _reset_delta(layer: nn.Linear) -> None:
    """Draw the bias so that softplus of it is log-uniform in DELTA_RANGE (Mamba, arXiv 2312.00752, 3.6).

    Every pass starts so; what the releases make of it afterwards is an ``initialisation`` of ``VimBase``.
    """
    bound = layer.in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    low, high = (math.log(value) for value in DELTA_RANGE)
    delta = torch.empty_like(layer.bias).uniform_(low, high).exp()
    layer.bias.copy_(delta + torch.log(-torch.expm1(-delta)))


def forget_deltas(mixer: nn.Module, kept: str = "") -> None:
    """Set the bias of the step sizes of every pass to 0, but of the one named ``kept``."""
    for name, layer in mixer.named_children():
        if name.startswith("dt_proj") and name != kept:
            nn.init.zeros_(layer.bias)


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in the dtype of the stream and handed on in the dtype of the weights."""

    def forward(self, stream: Tensor) -> Tensor:
        weight = self.weight.to(stream.dtype)
        return F.rms_norm(stream, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class Block(nn.Module):
    """(B, ..., E) -> (B, ..., E): ``t = z + Mixer(Norm(z))`` and, with an MLP, ``t + MLP(Norm(t))``."""

    def __init__(self, mixer: nn.Module, embed_dim: int, norm_eps: float, drop_path: float, mlp_ratio: float):
        super().__init__()
        self.norm, self.mixer = RMSNorm(embed_dim, norm_eps), mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = None
        if mlp_ratio:
            self.norm_mlp = RMSNorm(embed_dim, norm_eps)
            self.mlp = Mlp(embed_dim, int(mlp_ratio * embed_dim))

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.drop_path(self.mixer(self.norm(stream)))
        if self.mlp is not None:
            stream = stream + self.drop_path(self.mlp(self.norm_mlp(stream)))
        return stream


class VimBase(nn.Module):
    """The blocks and what stands around them; how images become tokens and what the head reads is a subclass's.

    ``tokens`` turns images into tokens; the class attribute ``TOKENS`` names it among the parameters. ``length`` tokens
    have a position each, ``class_tokens`` of them are parameters. ``mixer(i)`` makes the mixer of block i, which has a
    last map ``out_proj``. ``drop_path`` grows linearly from 0 at the first block.

    initialisation: "mamba", or "vim", as the official Vim and what was released on top of it start: their general
    initialisation sets the bias of every step size but the first pass's to 0 again, so that the way back (or a second
    pass) begins at softplus(0) = 0.69 and forgets within a token or two. Raises UserError for one that is not in
    ``INITIALISATIONS``.
    """

    TOKENS = "patch_embed"
    INITIALISATIONS = ("mamba", "vim")
    FREE_OF_DECAY = ("A_log", "A_b_log", "D", "D_b", "bias", "pos_embed", "cls_token")

    def __init__(
        self,
        *,
        tokens: nn.Module,
        length: int,
        class_tokens: int,
        embed_dim: int,
        depth: int,
        num_classes: int,
        mixer: Callable[[int], nn.Module],
        drop_path: float,
        drop_rate: float,
        norm_eps: float,
        mlp_ratio: float,
        initialisation: str,
    ):
        super().__init__()
        if initialisation not in self.INITIALISATIONS:
            raise UserError(
                f"initialisation {initialisation!r} is unknown: choose one of {', '.join(self.INITIALISATIONS)}"
            )
        self.num_features, self.num_classes = embed_dim, num_classes
        self.add_module(self.TOKENS, tokens)
        self.cls_token = None
        if class_tokens:
            start = torch.empty(1, class_tokens, embed_dim)
            self.cls_token = nn.Parameter(trunc_normal_(start, std=EMBEDDING_STD))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, length, embed_dim), std=EMBEDDING_STD))
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            Block(mixer(i), embed_dim, norm_eps, drop_path * i / max(depth - 1, 1), mlp_ratio) for i in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._reset_parameters(tokens)
        if initialisation == "vim":
            for layer in self.layers:
                forget_deltas(layer.mixer, kept="dt_proj")

    @torch.no_grad()
    def _reset_parameters(self, tokens: nn.Module) -> None:
        """As released: biases 0, the last map of every residual branch shrunk by the root of their number."""
        # Here rather than in the tokens, so that every kind of token starts alike.
        for layer in tokens.modules():
            if isinstance(layer, nn.Conv2d):
                lecun_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        if self.num_classes:
            trunc_normal_(self.head.weight, std=EMBEDDING_STD)
            nn.init.zeros_(self.head.bias)
        branches = sum(1 if layer.mlp is None else 2 for layer in self.layers)
        for layer in self.layers:
            layer.mixer.out_proj.weight /= math.sqrt(branches)
            if layer.mlp is not None:
                layer.mlp.fc2.weight /= math.sqrt(branches)
                nn.init.zeros_(layer.mlp.fc1.bias)
                nn.init.zeros_(layer.mlp.fc2.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, as timm's optimisers ask for them."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in self.FREE_OF_DECAY}

    def to_stream(self, tokens: Tensor) -> Tensor:
        """Return tokens with their positions as what the blocks add to: at least float32, it sums many of them."""
        stream = self.pos_drop(tokens)
        return stream.to(torch.promote_types(stream.dtype, torch.float32))

    def encode(self, tokens: Tensor) -> Tensor:
        """Return tokens with their positions, (B, ..., E), after all blocks and the last normalisation."""
        stream = self.to_stream(tokens)
        for layer in self.layers:
            stream = layer(stream)
        return self.norm_f(stream)
