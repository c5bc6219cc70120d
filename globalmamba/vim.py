"""Vim: a plain, isotropic network of bidirectional Mamba blocks, the first of GlobalMamba's two bases.

Vision Mamba, arXiv 2401.09417, section 3 and table 1 (vim_base.py): patches of 16 x 16 and a class token in the middle
of the sequence. GlobalMamba, arXiv 2410.10316, changes the tokens alone: ``tokens`` is any module that turns images
into a sequence. Its block diagram has an MLP behind the mixer (``mlp_ratio``), its release has none; its release also
scans forward only (``mixer="causal"``).

Names of parameters are those of the official checkpoints, except ``tokens.proj`` (theirs: ``patch_embed.proj``).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from globalmamba.kernels.selective_scan import selective_scan
from globalmamba.kernels.short_conv import short_conv
from globalmamba.vim_base import INITIALISATION, VimBase, add_pass
from shared.errors import UserError

CLASS_TOKENS = ("last", "middle", "mean")
MIXERS = ("bidirectional", "causal")


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
        sizes = {"width": width, "rank": self.rank, "state_dim": state_dim, "conv_kernel": conv_kernel}
        for suffix in ("", "_b") if bidirectional else ("",):
            add_pass(self, suffix, **sizes)
        self.out_proj = nn.Linear(width, embed_dim, bias=False)

    def _pair(self, name: str) -> list:
        """Return ``name`` of the forward direction and, where there is one, of the backward direction."""
        # A_log's partner is A_b_log, every other name has its _b at the end.
        partner = "A_b_log" if name == "A_log" else f"{name}_b"
        return [getattr(self, n) for n in ((name, partner) if self.bidirectional else (name,))]

    def _both(self, tensors: list[Tensor], dim: int) -> Tensor:
        return torch.cat(tensors, dim) if self.bidirectional else tensors[0]

    def _convolve(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D or 2 D): what is before each token, and what is behind it for the way back."""
        layers = self._pair("conv1d")
        weight = torch.stack([layer.weight[:, 0] for layer in layers])
        bias = torch.stack([layer.bias for layer in layers])
        row, directions = x[:, None, None], ("right", "left")[: len(layers)]  # a grid of one row
        backend = "reference" if self.backend == "reference" else "auto"
        convolved = short_conv(row, weight, bias, directions, backend, side_by_side=True)  # (B, K, 1, L, D)
        return convolved.squeeze(2).transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        # Two products rather than one that is cut in two: what follows wants dense tensors.
        x, gate = (F.linear(tokens, weight) for weight in self.in_proj.weight.chunk(2))
        u = self._convolve(x)  # (B, L, D or 2 D)
        halves = u.chunk(2, -1) if self.bidirectional else (u,)
        selected = [layer(half) for layer, half in zip(self._pair("x_proj"), halves, strict=True)]
        deltas = [
            F.linear(part[..., : self.rank], layer.weight)
            for layer, part in zip(self._pair("dt_proj"), selected, strict=True)
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


class Vim(VimBase):
    """Images (B, C, H, W) -> logits (B, num_classes), or features where num_classes is 0.

    ``tokens``: a module images -> (B, T, E) with the attribute ``num_tokens`` = T. ``class_token``: appended
    ("last"), inserted at T // 2 ("middle"), or none and the mean over the tokens instead ("mean"). A causal
    mixer with a middle class token (the release of GlobalMamba) never shows the second half to the head; with
    the last one read alone, the way back of the last block is one step long, so its A_b_log has gradient zero.
    ``drop_path`` grows linearly from 0 at the first block; ``initialisation`` is ``VimBase``'s. Raises UserError for an
    unknown choice.
    """

    TOKENS = "tokens"

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
        initialisation: str = INITIALISATION,
        backend: str = "auto",
    ):
        for key, value, choices in (("class_token", class_token, CLASS_TOKENS), ("mixer", mixer, MIXERS)):
            if value not in choices:
                raise UserError(f"{key} {value!r} is unknown: choose one of {', '.join(choices)}")
        length = tokens.num_tokens
        position = {"last": length, "middle": length // 2, "mean": None}[class_token]
        class_tokens = 0 if position is None else 1

        def mixer_of(layer: int) -> VimMixer:
            return VimMixer(embed_dim, state_dim, expand, conv_kernel, mixer == "bidirectional", backend)

        super().__init__(
            tokens=tokens,
            length=length + class_tokens,
            class_tokens=class_tokens,
            embed_dim=embed_dim,
            depth=depth,
            num_classes=num_classes,
            mixer=mixer_of,
            drop_path=drop_path,
            drop_rate=drop_rate,
            norm_eps=norm_eps,
            mlp_ratio=mlp_ratio,
            initialisation=initialisation,
        )
        self.class_token, self.position = class_token, position

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T or T + 1, E), after the last normalisation, class token in its place."""
        stream = self.tokens(images)
        if self.cls_token is not None:
            token = self.cls_token.expand(len(stream), -1, -1)
            stream = torch.cat([stream[:, : self.position], token, stream[:, self.position :]], 1)
        return self.encode(stream + self.pos_embed)

    def forward(self, images: Tensor) -> Tensor:
        features = self.forward_features(images)
        return self.head(features.mean(1) if self.position is None else features[:, self.position])
