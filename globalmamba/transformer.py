"""A decoder-only Transformer over image tokens: the paper's check that its serialization helps beyond Mamba.

GlobalMamba, arXiv 2410.10316, ablation "causal Transformer"; its width, depth and heads are not known, so the
configuration takes DeiT's (arXiv 2012.12877). Every token sees itself and the tokens before it, the class token
is the last one, and ``tokens`` is any module that turns images into a sequence.
"""

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError

STD = 0.02  # of the embeddings and the linear maps, as in DeiT


class CausalAttention(nn.Module):
    """(B, L, E) -> (B, L, E): self-attention that never looks ahead."""

    def __init__(self, embed_dim: int, heads: int):
        super().__init__()
        if embed_dim % heads:
            raise UserError(f"{heads} heads do not share a width of {embed_dim}: choose a divisor of it")
        self.heads = heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        split = self.qkv(tokens).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, heads, L, E / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """(B, L, E) -> (B, L, E): attention and MLP, each behind a LayerNorm and beside a residual."""

    def __init__(self, embed_dim: int, heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(embed_dim, 1e-6), CausalAttention(embed_dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(embed_dim, 1e-6), Mlp(embed_dim, int(mlp_ratio * embed_dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.drop_path(self.attention(self.norm1(stream)))
        return stream + self.drop_path(self.mlp(self.norm2(stream)))


class CausalTransformer(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes); ``backend`` is taken for the sake of one interface."""

    def __init__(
        self,
        *,
        tokens: nn.Module,
        embed_dim: int,
        depth: int,
        heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        self.tokens, self.num_classes = tokens, num_classes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens.num_tokens + 1, embed_dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(Block(embed_dim, heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, 1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=STD)
        for layer in (*self.layers.modules(), self.head):
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=STD)
                nn.init.zeros_(layer.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone."""
        return {"cls_token", "pos_embed"}

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T + 1, E), after the last normalisation; the class token is the last one."""
        tokens = self.tokens(images)
        stream = torch.cat([tokens, self.cls_token.expand(len(tokens), -1, -1)], 1) + self.pos_embed
        for layer in self.layers:
            stream = layer(stream)
        return self.norm(stream)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images)[:, -1])
