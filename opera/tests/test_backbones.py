"""The backbones: sizes, and what MoCo-v3 fixes of a ViT."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from opera.backbones import BUILDERS, build_backbone, sine_cosine_positions
from shared.errors import UserError

# image size, parameters (fixed ones included), multiply-adds of linear maps and convolutions, features
SIZES = {
    "resnet50": (224, 23_508_032, 4_087_136_256, 2048),
    "vit-small": (224, 21_665_664, None, 384),
    "vit-base": (224, 85_798_656, None, 768),
    "resnet-small": (32, 1_238_656, None, 256),
    "vit-tiny": (32, 2_691_648, None, 192),
    "convnet-tiny": (8, 23_696, None, 64),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_features_parameters_and_multiply_adds_are_as_documented(name):
    size, parameters, multiply_adds, features = SIZES[name]
    with torch.device("meta"):
        backbone = build_backbone(name, size).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            actual = backbone(torch.empty(2, 3, size, size))
    assert actual.shape == (2, features) and backbone.num_features == features
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
    if multiply_adds is not None:
        assert counter.get_total_flops() == 2 * 2 * multiply_adds
    assert name not in ("resnet-small",) or counter.get_total_flops() < 4 * 20e6


def test_a_vit_has_twelve_heads_fixed_positions_and_a_frozen_patch_projection():
    vit = build_backbone("vit-small", 32)
    assert vit.blocks[0].attn.num_heads == 12
    fixed = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert fixed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    vit(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in vit.parameters() if p.requires_grad)


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = sine_cosine_positions(3, 5, 8)
    assert table.shape == (1, 16, 8) and not table[0, 0].any()
    row, column = 2, 4
    omega = torch.tensor([1.0, 10000.0**-0.5])
    wanted = [(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()]
    torch.testing.assert_close(table[0, 1 + row * 5 + column], torch.cat(wanted))


def test_qkv_is_drawn_as_three_maps():
    torch.manual_seed(0)
    weight = build_backbone("vit-small", 32).blocks[0].attn.qkv.weight
    bound = (6 / (384 + 384)) ** 0.5
    assert bound * 0.99 < weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["resnet-small", "convnet-tiny", "resnet50"])
def test_convolutional_ones_have_batch_norm_and_transformers_none(name):
    assert any(isinstance(part, nn.BatchNorm2d) for part in build_backbone(name, 32).modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in build_backbone("vit-tiny", 32).modules())


def test_an_unknown_backbone_names_the_known_ones():
    with pytest.raises(UserError, match="choose one of resnet50, vit-small"):
        build_backbone("vgg", 32)
