"""The network of embeddings: two heads on pooled features, a frozen batch norm, the warm-up's two groups."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from idml.backbones import ConvNetTiny
from idml.embedding import EmbeddingNetwork, freeze_batchnorm
from shared.errors import UserError

S, U, BATCH = 7, 5, 4
DRAWN = 0.03  # relative error of a standard deviation from 32,768 draws: eight of its own deviations
SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of 64 terms
HALF = {"rtol": 0.05, "atol": 0.05}  # bfloat16 has 8 bits; five layers of values about 1


def images(size: int = 8) -> torch.Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))


def made(uncertainty_dim: int = U, frozen: bool = False, **options) -> EmbeddingNetwork:
    torch.manual_seed(0)
    backbone = ConvNetTiny()
    if frozen:
        freeze_batchnorm(backbone)
    return EmbeddingNetwork(backbone, S, uncertainty_dim, **options)


class Wide(nn.Identity):
    num_features = 256


@pytest.mark.parametrize("pooling", ["max+avg", "max", "avg"])
def test_the_embedding_is_semantic_then_uncertainty_of_the_pooled_features(pooling):
    network = made(pooling=pooling).eval()
    maps = network.backbone(images()).flatten(2)
    parts = {"max": maps.max(2).values, "avg": maps.mean(2)}
    features = sum(parts[part] for part in pooling.split("+"))
    heads = [network.semantic, network.uncertainty]
    expected = torch.cat([features @ head.weight.T + head.bias for head in heads], 1)
    assert expected.shape == (BATCH, S + U)
    torch.testing.assert_close(network(images()), expected, **SINGLE)


def test_neither_half_is_normalised():
    actual = made().eval()(images())
    for half in actual.split([S, U], 1):
        assert half.norm(dim=1).std() > 1e-3


def test_a_baseline_has_no_second_head():
    network = made(uncertainty_dim=0)
    assert network(images()).shape == (BATCH, S)
    assert len(list(network.head_parameters())) == 2
    assert not any(name.startswith("uncertainty") for name in network.state_dict())


def test_introspection_leaves_the_semantic_half_of_the_same_seed_as_it_was():
    baseline, introspective = made(uncertainty_dim=0).eval(), made().eval()
    torch.testing.assert_close(introspective(images())[:, :S], baseline(images()), **SINGLE)


def test_the_semantic_head_is_drawn_by_fan_out_and_the_uncertainty_head_as_named():
    torch.manual_seed(0)
    for name in ("linear", "fan_out"):
        network = EmbeddingNetwork(Wide(), 128, 128, uncertainty_init=name)
        fan_out = math.sqrt(2 / 128)
        assert network.semantic.weight.std().item() == pytest.approx(fan_out, rel=DRAWN)
        assert not network.semantic.bias.any()
        weight, bias = network.uncertainty.weight, network.uncertainty.bias
        uniform = 1 / math.sqrt(3 * Wide.num_features)
        expected = fan_out if name == "fan_out" else uniform
        assert weight.std().item() == pytest.approx(expected, rel=DRAWN)
        assert bias.any().item() == (name == "linear")


@pytest.mark.parametrize("uncertainty_dim", [0, U])
def test_every_parameter_gets_gradient(uncertainty_dim):
    network = made(uncertainty_dim).train()
    network(images()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_frozen_batch_norm_stays_as_it_is_through_train_and_a_step():
    network = made(frozen=True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    network(images()).square().sum().backward()
    optimizer.step()
    norms = [f"backbone.{n}." for n, m in network.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3
    for name, value in network.state_dict().items():
        assert value.equal(before[name]) == name.startswith(tuple(norms)), name


def test_a_frozen_batch_norm_uses_its_statistics_in_train_mode_and_others_do_not():
    for frozen in (True, False):
        network = made(frozen=frozen)
        same = torch.allclose(network.train()(images()), network.eval()(images()), atol=1e-6)
        assert same == frozen


def test_freezing_changes_no_name_no_tensor_and_returns_the_backbone():
    torch.manual_seed(0)
    backbone = ConvNetTiny()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert freeze_batchnorm(backbone) is backbone
    after = backbone.state_dict()
    assert list(after) == list(before) and all(after[name].equal(before[name]) for name in before)


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))], ids=["copy", "pickle"]
)
def test_a_copy_is_frozen_as_well_and_by_itself(carry):
    network = made(frozen=True)
    twin = carry(network).train()
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert not set(norms) & set(network.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_two_groups_are_all_trained_parameters_once(frozen):
    network = made(frozen=frozen)
    groups = [*network.head_parameters(), *network.backbone_parameters()]
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert len(groups) == len(trained) and {id(parameter) for parameter in groups} == trained
    assert len(list(network.head_parameters())) == 4
    assert len(list(network.backbone_parameters())) == (3 if frozen else 9)


def test_half_precision_gives_the_same_embedding_up_to_its_bits():
    network = made().eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = network(images())
    torch.testing.assert_close(half.float(), network(images()), **HALF)


@pytest.mark.parametrize(
    "options, key",
    [
        ({"pooling": "sum"}, "pooling=sum"),
        ({"uncertainty_init": "zero"}, "uncertainty_init=zero"),
        ({"uncertainty_dim": -1}, "model.uncertainty_dim=-1"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(options, key):
    with pytest.raises(UserError, match=key) as raised:
        made(**options)
    assert "\n" not in str(raised.value)
