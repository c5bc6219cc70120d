"""PyramidNet: the published counts, widths that grow evenly, a shortcut without parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from idml.pyramidnet import Bottleneck, PyramidNet, pyramidnet
from shared.errors import UserError

SAME = {"rtol": 0, "atol": 0}  # adding zeros changes no bit
# Printed as 26.8 M for depth 200, alpha 240 (arXiv 1610.02915, tables 4 and 5).
PUBLISHED = {10: 26_752_702, 100: 26_844_952}


def small(classes: int = 10) -> PyramidNet:
    torch.manual_seed(0)
    return pyramidnet(depth=20, alpha=24, classes=classes)


@pytest.mark.parametrize("classes", PUBLISHED)
def test_depth_200_and_alpha_240_have_the_published_parameters(classes):
    with torch.device("meta"):
        network = pyramidnet(classes=classes)
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[classes]
    assert network.num_features == 4 * (16 + 240)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 200
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        logits = network.eval()(torch.empty(1, 3, 32, 32, device="meta"))
    assert logits.shape == (1, classes)
    assert counter.get_total_flops() // 2 == 4_519_595_776 + 1024 * classes


def test_widths_grow_by_the_same_amount_up_to_alpha():
    blocks = small().blocks
    assert [block.residual[1].out_channels for block in blocks] == [20, 24, 28, 32, 36, 40]
    assert [block.stride for block in blocks] == [1, 1, 2, 1, 2, 1]


def test_widths_are_rounded_to_the_nearest():
    widths = [block.residual[1].out_channels for block in pyramidnet(20, 10).blocks]
    assert widths == [18, 19, 21, 23, 24, 26]  # 17.67, 19.33, 21, 22.67, 24.33, 26


@pytest.mark.parametrize("stride, side", [(1, 8), (2, 8), (2, 7)])
def test_the_shortcut_pools_and_fills_up_with_zeros(stride, side):
    block = Bottleneck(12, 5, stride)
    nn.init.zeros_(block.residual[-1].weight)  # nothing but the shortcut comes through
    maps = torch.randn(2, 12, side, side)
    expected = maps if stride == 1 else F.avg_pool2d(maps, 2, ceil_mode=True)
    actual = block(maps)
    assert actual.shape == (2, 20, -(-side // stride), -(-side // stride))
    torch.testing.assert_close(actual[:, :12], expected, **SAME)
    assert not actual[:, 12:].any()


def test_logits_are_the_classifier_of_the_features():
    network, images = small().eval(), torch.randn(3, 3, 32, 32)
    features = network.forward_features(images)
    assert features.shape == (3, network.num_features) and (features >= 0).all()
    torch.testing.assert_close(network(images), network.classifier(features), **SAME)


def test_without_classes_it_is_a_body_that_gives_features():
    network, images = small(classes=0).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images), network.forward_features(images), **SAME)
    assert not any(name.startswith("classifier") for name in network.state_dict())


def test_every_parameter_gets_gradient():
    network = small().train()
    F.cross_entropy(network(torch.randn(4, 3, 16, 16)), torch.tensor([1, 2, 3, 4])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_convolutions_are_drawn_over_their_outputs():
    torch.manual_seed(0)
    convolution = pyramidnet(11, 240).blocks[2].residual[4]
    expected = (2 / (9 * convolution.out_channels)) ** 0.5
    assert convolution.weight.std().item() == pytest.approx(expected, rel=0.01)  # from 5.9e5 draws


@pytest.mark.parametrize("depth", [2, 12, 201])
def test_an_impossible_depth_is_one_sentence(depth):
    with pytest.raises(UserError, match=f"depth {depth}: choose 9 n"):
        pyramidnet(depth=depth)


@pytest.mark.slow
def test_depth_200_runs_forward_and_backward_in_half_precision():
    torch.manual_seed(0)
    network = pyramidnet(classes=10)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(2, 3, 32, 32))
    F.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
