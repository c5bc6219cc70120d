"""The networks that are pre-trained: images (B, 3, S, S) -> features (B, C), on timm's layers.

resnet50             timm's, as torchvision's
vit-small, vit-base  MoCo-v3's: 16 x 16 patches, a class token, positions that are fixed sines and cosines, and a patch
                     projection that stays as it is drawn; vit-small has 12 heads (DeiT-S has 6)
resnet-small, vit-tiny, convnet-tiny   ours, for images of 32 to 96, 32 and 8 pixels
"""

import math
from functools import partial

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnet import resnet50 as timm_resnet50
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from shared.errors import UserError

TEMPERATURE = 10000.0  # of the positions' frequencies


class ConvNetTiny(nn.Module):
    """Three convolutions, for digits."""

    num_features = 64

    def __init__(self):
        super().__init__()
        parts, before = [], 3
        for width in (16, 32, 64):
            parts += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        self.body = nn.Sequential(*parts)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


def resnet_small() -> nn.Module:
    """A narrow ResNet of ten layers, its first convolution in steps of two: 19 M multiply-adds at 32 pixels."""
    network = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(32, 64, 128, 256), num_classes=0)
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=2, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def sine_cosine_positions(height: int, width: int, dim: int) -> Tensor:
    """Return MoCo-v3's fixed positions (1, 1 + height * width, dim), the class token's 0; dim is a multiple of 4."""
    frequencies = TEMPERATURE ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = (place.flatten()[:, None].float() * frequencies for place in (columns, rows))
    grid = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], 1)
    return torch.cat([torch.zeros(1, dim), grid])[None]


def vision_transformer(
    image_size: int, patch: int, dim: int, depth: int, heads: int, drop_path: float
) -> VisionTransformer:
    """Return MoCo-v3's ViT for images of one size: what ends it is the class token."""
    network = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        drop_path_rate=drop_path,
        global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    side = image_size // patch
    network.pos_embed = nn.Parameter(sine_cosine_positions(side, side, dim), requires_grad=False)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            # The three maps of qkv are drawn as three, not as one.
            outputs = layer.out_features // 3 if name.endswith("qkv") else layer.out_features
            bound = math.sqrt(6 / (outputs + layer.in_features))
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(network.cls_token, std=1e-6)
    projection = network.patch_embed.proj
    bound = math.sqrt(6 / (3 * patch**2 + dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)
    return network


# image size and rate of stochastic depth -> network
BUILDERS = {
    "resnet50": lambda size, drop_path: timm_resnet50(num_classes=0, drop_path_rate=drop_path),
    "vit-small": lambda size, drop_path: vision_transformer(size, 16, 384, 12, 12, drop_path),
    "vit-base": lambda size, drop_path: vision_transformer(size, 16, 768, 12, 12, drop_path),
    "resnet-small": lambda size, drop_path: resnet_small(),
    "vit-tiny": lambda size, drop_path: vision_transformer(size, max(size // 8, 1), 192, 6, 3, drop_path),
    "convnet-tiny": lambda size, drop_path: ConvNetTiny(),
}


def build_backbone(name: str, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """Return an untrained backbone with ``num_features``, the width of its features; UserError for an unknown name.

    ``drop_path``: the largest rate at which stochastic depth leaves out a block; our small ResNets have none.
    """
    if name not in BUILDERS:
        raise UserError(f"model.backbone={name} is unknown: choose one of {', '.join(BUILDERS)}")
    return BUILDERS[name](image_size, drop_path)
