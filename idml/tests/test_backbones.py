"""The backbones: sizes, and the weights of ResNet-50 from files of timm and torchvision."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from idml.backbones import COUNTER, build_backbone, load_pretrained, read_weights
from shared.errors import UserError

SINGLE = {"rtol": 1e-4, "atol": 1e-4}  # float32 through 50 layers, features of order one
# name: parameters, multiply-adds, size of the image that they are for, maps (C, h, w)
SIZES = {
    "resnet50": (23_508_032, 4_087_136_256, 224, (2048, 7, 7)),
    "resnet-small": (1_226_400, 63_799_296, 64, (256, 4, 4)),
    "convnet-tiny": (42_624, 718_848, 8, (64, 4, 4)),
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(name).eval()


def one_sentence(error, path) -> bool:
    text = str(error.value)
    return str(path) in text and "\n" not in text and text.endswith("that holds its state dict alone")


@pytest.mark.parametrize("name", SIZES)
def test_maps_parameters_and_multiply_adds_are_as_documented(name):
    parameters, multiply_adds, size, maps = SIZES[name]
    backbone, counter = on_meta(name), FlopCounterMode(display=False)
    with counter, torch.no_grad():
        actual = backbone(torch.empty(2, 3, size, size, device="meta"))
    assert actual.shape == (2, *maps) and backbone.num_features == maps[0]
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
    assert counter.get_total_flops() == 2 * 2 * multiply_adds  # a multiply-add counts 2 there; two images


@pytest.mark.parametrize("name", ["resnet-small", "convnet-tiny"])
def test_a_small_backbone_trains_by_batch_norm_and_every_parameter_gets_gradient(name):
    torch.manual_seed(0)
    backbone = build_backbone(name).train()
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert not any(isinstance(module, nn.GroupNorm) for module in backbone.modules())
    maps = backbone(torch.randn(4, 3, SIZES[name][2], SIZES[name][2]))
    (maps * torch.randn(maps.shape)).sum().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


def settled(network: nn.Module) -> nn.Module:
    """With statistics and scales that are not those of a fresh network, in evaluation mode."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.9, 1.1)
                module.weight.uniform_(0.5, 1.0)
                module.bias.uniform_(-0.1, 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def published():
    """timm's and torchvision's own ResNet-50, each with weights of its own."""
    torch.manual_seed(0)
    return {
        "timm": settled(timm.create_model("resnet50", pretrained=False)),
        "torchvision": settled(torchvision.models.resnet50()),
    }


@pytest.mark.parametrize("source, ending", [("timm", ".safetensors"), ("torchvision", ".pth")])
def test_weights_of_a_file_give_the_features_of_the_network_that_wrote_it(published, source, ending, tmp_path):
    network, path = published[source], tmp_path / f"weights{ending}"
    (save_file if ending == ".safetensors" else torch.save)(network.state_dict(), path)
    backbone = build_backbone("resnet50", path).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = network(images)
        torch.testing.assert_close(network.fc(backbone(images).mean((2, 3))), logits, **SINGLE)
    assert logits.std() > 0.1


def meta_state() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return torchvision.models.resnet50().state_dict()


def test_a_file_from_before_batch_norm_counted_its_batches_loads():
    backbone = settled(timm.create_model("resnet50", pretrained=False, num_classes=0, global_pool=""))
    old = {name: value + 1 for name, value in backbone.state_dict().items() if not name.endswith(COUNTER)}
    load_pretrained(backbone, old, "old.pth")
    actual = backbone.state_dict()
    assert all(actual[name].equal(old[name]) for name in old)
    assert all(not actual[name].any() for name in actual.keys() - old.keys())


def without(name):
    return {key: value for key, value in meta_state().items() if key != name}


def deeper():
    with torch.device("meta"):
        return torchvision.models.resnet101().state_dict()


WRONG = {
    "missing": (lambda: without("layer4.2.conv3.weight"), "layer4.2.conv3.weight"),
    "statistics-missing": (lambda: without("bn1.running_mean"), "bn1.running_mean"),
    "other-shape": (lambda: meta_state() | {"conv1.weight": torch.empty(64, 3, 3, 3)}, "conv1.weight"),
    "deeper": (deeper, "layer3.10"),
    "prefixed": (lambda: {f"module.{key}": value for key, value in meta_state().items()}, "bn1.bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_are_one_sentence(case):
    state, name = WRONG[case]
    with pytest.raises(UserError, match=name) as raised:
        load_pretrained(on_meta("resnet50"), state(), "weights.pth")
    assert one_sentence(raised, "weights.pth")


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [None, b"", b"no weights", b"PK\x03\x04"])
def test_a_missing_or_damaged_file_is_one_sentence(content, ending, tmp_path):
    path = tmp_path / f"weights{ending}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        build_backbone("resnet50", path)
    assert one_sentence(raised, path)


@pytest.mark.parametrize("content", [torch.zeros(2), {"state_dict": {}}, {"fc": nn.Linear(2, 2)}])
def test_a_file_without_a_plain_state_dict_is_one_sentence_and_runs_no_code(content, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(UserError) as raised:
        read_weights(path)
    assert one_sentence(raised, path)


def test_an_unknown_backbone_and_weights_for_a_small_one_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"model.backbone=resnet51 is unknown: choose one of resnet50, "):
        build_backbone("resnet51")
    with pytest.raises(UserError, match="resnet-small trains from scratch"):
        build_backbone("resnet-small", tmp_path / "weights.pth")
