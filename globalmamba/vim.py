"""Vim: a plain, isotropic network of bidirectional Mamba blocks, the first of GlobalMamba's two bases.

Vision Mamba, arXiv 2401.09417, section 3 and table 1 (https://github.com/hustvl/Vim): patches of 16 x 16, depth
24, width 192 (tiny) or 384 (small), a class token in the middle of the sequence, learned absolute positions,
and per block ``stream + Mixer(RMSNorm(stream))`` with the stream in float32. GlobalMamba, arXiv 2410.10316,
changes the tokens alone: ``tokens`` is any module that turns images into a sequence. Its block diagram has an MLP
behind the mixer (``mlp_ratio``), its release has none; its release also scans forward only
(``mixer="causal"``).

Names of parameters are those of the official checkpoints, except ``tokens.proj`` (theirs: ``patch_embed.proj``).
"""

import math

import torch
from timm.layers import DropPath, Mlp, lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from globalmamba.kernels.selective_scan import selective_scan
from globalmamba.kernels.short_conv import short_conv
from shared.errors import UserError

CLASS_TOKENS = ("last", "middle", "mean")
MIXERS = ("bidirectional", "causal")
DELTA_RANGE = (1e-3, 0.1)  # the time steps that a fresh network starts with, log-uniform
EMBEDDING_STD = 0.02
FREE_OF_DECAY = ("A_log", "A_b_log", "D", "D_b", "bias", "pos_embed", "cls_token")


class PatchTokens(nn.Module):
    """(B, C, H, W) -> (B, T, E): one linear map of every patch, in raster order."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int, in_channels: int = 3):
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise UserError(
                f"patches of {patch_size} do not tile an image of {image_size}: choose image_size as a multiple "
                "of patch_size"
            )
        self.image_size, self.in_channels = image_size, in_channels
        self.num_tokens = (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.shape[1:] != expected:
            raise UserError(
                f"the network takes images of shape {expected}, got {tuple(images.shape[1:])}: resize the images "
                "or build the network with their image_size"
            )
        return self.proj(images).flatten(2).transpose(1, 2)


class VimMixer(nn.Module):
    """(B, L, E) -> (B, L, E): the selective state space model, in both directions (v2) or forward only.

    The directions share the projections in and out and the gate; each has its own short convolution, time step,
    B, C, A and D. They are one scan over 2 x D channels, so no tensor is ever flipped. The sum of the two is
    halved. Without the backward direction its parameters do not exist.
    """

    def __init__(
        self,
        embed_dim: int,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        bidirectional: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        width = expand * embed_dim
        self.bidirectional, self.backend = bidirectional, backend
        self.state_dim, self.rank = state_dim, math.ceil(embed_dim / 16)
        self.in_proj = nn.Linear(embed_dim, 2 * width, bias=False)
        for suffix in ("", "_b") if bidirectional else ("",):
            # Holds the parameters under their official names; ``_convolve`` uses them.
            self.add_module(f"conv1d{suffix}", nn.Conv1d(width, width, conv_kernel, groups=width))
            self.add_module(f"x_proj{suffix}", nn.Linear(width, self.rank + 2 * state_dim, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(self.rank, width))
            A_log = torch.arange(1.0, state_dim + 1).log().repeat(width, 1)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(A_log))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(width)))
            self._reset_delta(getattr(self, f"dt_proj{suffix}"))
        self.out_proj = nn.Linear(width, embed_dim, bias=False)

    @torch.no_grad()
    def _reset_delta(self, layer: nn.Linear) -> None:
        """Draw the bias so that softplus of it is log-uniform in DELTA_RANGE (Mamba, arXiv 2312.00752, 3.6).

        The official Vim does so forward; backward its general initialisation sets this bias to 0 again, which
        looks like an oversight: there the steps start at softplus(0) = 0.69 and forget within a token or two.
        """
        nn.init.uniform_(layer.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = (math.log(value) for value in DELTA_RANGE)
        delta = torch.empty_like(layer.bias).uniform_(low, high).exp()
        layer.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def _pair(self, name: str) -> list:
        """Return ``name`` of the forward direction and, where there is one, of the backward direction."""
        # A_log's partner is A_b_log, every other name has its _b at the end.
        partner = "A_b_log" if name == "A_log" else f"{name}_b"
        return [getattr(self, one) for one in ((name, partner) if self.bidirectional else (name,))]

    def _both(self, tensors: list[Tensor], dim: int) -> Tensor:
        return torch.cat(tensors, dim) if self.bidirectional else tensors[0]

    def _convolve(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D or 2 D): what is before each token, and what is behind it for the way back."""
        layers = self._pair("conv1d")
        weight, bias = (
            torch.stack([one.weight[:, 0] for one in layers]),
            torch.stack([o.bias for o in layers]),
        )
        return short_conv(x, weight, bias, "reference" if self.backend == "reference" else "auto")

    def forward(self, tokens: Tensor) -> Tensor:
        # Two products rather than one that is cut in two: what follows wants dense tensors.
        x, gate = (F.linear(tokens, weight) for weight in self.in_proj.weight.chunk(2))
        u = self._convolve(x)  # (B, L, D or 2 D)
        halves = u.chunk(2, -1) if self.bidirectional else (u,)
        selected = [layer(half) for layer, half in zip(self._pair("x_proj"), halves, strict=True)]
        deltas = [
            F.linear(one[..., : self.rank], layer.weight)
            for layer, one in zip(self._pair("dt_proj"), selected, strict=True)
        ]
        groups = torch.stack(selected, 1)[..., self.rank :].transpose(2, 3)  # (B, 1 or 2, 2 N, L)
        B, C = groups.chunk(2, 2)
        logs = [log.to(torch.promote_types(log.dtype, torch.float32)) for log in self._pair("A_log")]
        y = selective_scan(
            u.transpose(1, 2),
            self._both(deltas, -1).transpose(1, 2),
            -torch.exp(self._both(logs, 0)),
            B,
            C,
            self._both(self._pair("D"), 0),
            z=None if self.bidirectional else gate.transpose(1, 2),
            delta_bias=self._both([layer.bias for layer in self._pair("dt_proj")], 0),
            delta_softplus=True,
            backend=self.backend,
            reverse=(False, True) if self.bidirectional else False,
        ).transpose(1, 2)
        if not self.bidirectional:
            return self.out_proj(y)
        # The gate is the same for both directions, so it is applied once, to their sum; halving a weight is
        # exact, so it is done there rather than on every token.
        ahead, back = y.chunk(2, -1)
        return F.linear((ahead + back) * F.silu(gate), self.out_proj.weight / 2)


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in the dtype of the stream and handed on in the dtype of the weights."""

    def forward(self, stream: Tensor) -> Tensor:
        weight = self.weight.to(stream.dtype)
        return F.rms_norm(stream, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class Block(nn.Module):
    """(B, L, E) -> (B, L, E): ``t = z + Mixer(Norm(z))`` and, with an MLP, ``t + MLP(Norm(t))``."""

    def __init__(self, mixer: VimMixer, embed_dim: int, norm_eps: float, drop_path: float, mlp_ratio: float):
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


class Vim(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes), or features where num_classes is 0.

    ``tokens``: a module images -> (B, T, E) with the attribute ``num_tokens`` = T. ``class_token``: appended
    ("last"), inserted at T // 2 ("middle"), or none and the mean over the tokens instead ("mean"). A causal
    mixer with a middle class token (the release of GlobalMamba) never shows the second half to the head; with
    the last one read alone, the way back of the last block is one step long, so its A_b_log has gradient zero.
    ``drop_path`` grows linearly from 0 at the first block. Raises UserError for an unknown choice.
    """

    def __init__(
        self,
        *,
        tokens: nn.Module,
        embed_dim: int,
        depth: int,
        num_classes: int,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        class_token: str = "middle",
        mixer: str = "bidirectional",
        drop_path: float = 0.0,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        mlp_ratio: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        for key, value, choices in (("class_token", class_token, CLASS_TOKENS), ("mixer", mixer, MIXERS)):
            if value not in choices:
                raise UserError(f"{key} {value!r} is unknown: choose one of {', '.join(choices)}")
        self.num_features, self.num_classes = embed_dim, num_classes
        self.tokens, self.class_token = tokens, class_token
        length = tokens.num_tokens
        self.position = {"last": length, "middle": length // 2, "mean": None}[class_token]
        self.cls_token = None
        if self.position is not None:
            length += 1
            self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=EMBEDDING_STD))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, length, embed_dim), std=EMBEDDING_STD))
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            Block(
                VimMixer(embed_dim, state_dim, expand, conv_kernel, mixer == "bidirectional", backend),
                embed_dim,
                norm_eps,
                drop_path * i / max(depth - 1, 1),
                mlp_ratio,
            )
            for i in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """As released: biases 0, the last map of every residual branch shrunk by the root of their number."""
        # Here rather than in the tokens, so that every kind of token starts alike.
        for layer in self.tokens.modules():
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
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in FREE_OF_DECAY}

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T or T + 1, E), after the last normalisation, class token in its place."""
        stream = self.tokens(images)
        if self.cls_token is not None:
            token = self.cls_token.expand(len(stream), -1, -1)
            stream = torch.cat([stream[:, : self.position], token, stream[:, self.position :]], 1)
        stream = self.pos_drop(stream + self.pos_embed)
        # Sums of many blocks: at least float32, whatever the blocks compute in.
        stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        for layer in self.layers:
            stream = layer(stream)
        return self.norm_f(stream)

    def forward(self, images: Tensor) -> Tensor:
        features = self.forward_features(images)
        return self.head(features.mean(1) if self.position is None else features[:, self.position])
