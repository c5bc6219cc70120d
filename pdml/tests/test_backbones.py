"""Backbones: layer tables, one feature per pixel that sees its whole patch, the pass over a whole scene."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import get_class
from omegaconf import OmegaConf

from pdml.backbones import context, ssftt
from pdml.backbones.context import Backbone, GlobalContext
from shared.errors import UserError

# float64 sums of up to 10^4 terms of order one, in another order
EXACT = 1e-10
# float32 sums of 25 terms and one attention
SINGLE = 1e-4
# float64 rounding of features of order one: below it nothing has changed
ROUNDING = 1e-13

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
DENSE = ["ssrn", "hybridsn", "ssftt"]
ALL = [*DENSE, "ssrn-published"]


def build(name: str, patch_size: int = 9, bands: int = 15) -> Backbone:
    torch.manual_seed(0)
    config = dict(OmegaConf.load(CONFIGS / f"{name}.yaml").backbone)
    # not hydra's instantiate: it would wrap a UserError in an exception of its own
    return get_class(config.pop("_target_"))(bands=bands, patch_size=patch_size, **config)


def settled(name: str, patch_size: int = 9, bands: int = 15) -> Backbone:
    """In float64 and evaluation mode, with running statistics that are not those of a fresh network."""
    net = build(name, patch_size, bands).double().train()
    net(torch.randn(8, bands, patch_size, patch_size, dtype=torch.float64) * 2 + 1)
    return net.eval()


def one_pixel_kernels(net: Backbone) -> Backbone:
    """The network with every 3 x 3 kernel reduced to its centre."""
    for parameter in net.parameters():
        if parameter.shape[-2:] == (3, 3):
            centre = parameter.data[..., 1, 1].clone()
            parameter.data.zero_()[..., 1, 1] = centre
    return net


def every_patch(image: torch.Tensor, p: int) -> torch.Tensor:
    """(1, bands, H, W) -> (H * W, bands, p, p), mirrored at the border."""
    r = p // 2
    windows = F.pad(image, (r, r, r, r), mode="reflect").unfold(2, p, 1).unfold(3, p, 1)
    return windows[0].permute(1, 2, 0, 3, 4).flatten(0, 1)


@torch.no_grad()
def scene_and_patches(net: Backbone, height: int = 7, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The feature of every pixel, by the pass over the scene and at the centre of its own patch."""
    image = torch.randn(1, net.bands, height, width, dtype=torch.float64)
    r = net.patch_size // 2
    centres = net(every_patch(image, net.patch_size))[:, :, r, r]
    return net.forward_scene(image), centres.T.unflatten(1, (height, width))[None]


@pytest.mark.parametrize("name", ALL)
def test_every_constructor_argument_stands_in_the_config(name):
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    signature = inspect.signature(get_class(config.backbone._target_).__init__)
    assert set(signature.parameters) - {"self", "bands", "patch_size"} == set(config.backbone) - {"_target_"}
    assert all(p.default is p.empty for p in signature.parameters.values())
    assert set(config) == {"name", "backbone"}


@pytest.mark.parametrize("patch_size", [5, 9])
@pytest.mark.parametrize("name", DENSE)
def test_dense_backbone_keeps_a_feature_per_pixel(name, patch_size):
    features = build(name, patch_size)(torch.randn(3, 15, patch_size, patch_size))
    assert features.shape == (3, build(name).out_features, patch_size, patch_size)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_learns(name):
    net = build(name)
    net(torch.randn(4, 15, 9, 9)).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_feature_of_every_pixel_depends_on_every_pixel_of_the_patch(name):
    net = settled(name)
    patch = torch.randn(1, 15, 9, 9, dtype=torch.float64)
    changed = patch.repeat(81, 1, 1, 1)
    changed[torch.arange(81), :, torch.arange(81) // 9, torch.arange(81) % 9] += 1
    difference = (net(changed) - net(patch)).abs().amax(1)
    assert difference.min() > ROUNDING


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_convolutions_reach_as_far_as_stated_and_no_further(name):
    net = settled(name)
    image = torch.randn(1, 15, 17, 17, dtype=torch.float64)
    moved = image.clone()
    moved[:, :, 8, 8] += 1
    rows = (net.local(moved) - net.local(image)).abs().amax((0, 1, 3)) > ROUNDING
    assert rows.nonzero()[:, 0].tolist() == list(range(8 - net.reach, 8 + net.reach + 1))


@pytest.mark.parametrize("name", DENSE)
def test_scene_pass_equals_patches_when_kernels_look_at_one_pixel(name):
    """Nothing is padded then, so windows (patch mean, tokens) and head must agree, at the border too."""
    net = one_pixel_kernels(settled(name, patch_size=5))
    scene, patches = scene_and_patches(net)
    torch.testing.assert_close(scene, patches, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", DENSE)
def test_scene_pass_equals_patches_when_the_patch_holds_all_that_its_centre_sees(name):
    """With the view of the whole patch silenced, the centre of a patch 2 reach + 1 wide sees no padding."""
    reach = build(name).reach
    net = settled(name, patch_size=2 * reach + 1)
    last = net.context.linear if isinstance(net.context, GlobalContext) else net.context.read.out_proj
    last.weight.data.zero_()
    last.bias.data.zero_()
    scene, patches = scene_and_patches(net)
    torch.testing.assert_close(scene, patches, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", DENSE)
def test_scene_pass_differs_by_the_padding_inside_patches_and_stays_close(name):
    scene, patches = scene_and_patches(settled(name))
    difference = ((scene - patches).norm() / patches.norm()).item()
    assert 1e-4 < difference < 0.5


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_scene_pass_does_not_depend_on_its_strips(name, monkeypatch):
    net = settled(name, patch_size=5)
    image = torch.randn(1, 15, 23, 8, dtype=torch.float64)
    whole = net.forward_scene(image)
    monkeypatch.setattr(context, "STRIP_ROWS", 4)
    monkeypatch.setattr(ssftt, "WINDOWS", 7)
    torch.testing.assert_close(net.forward_scene(image), whole, rtol=0, atol=EXACT)


@torch.no_grad()
def test_tokens_of_a_dark_window_survive_a_bright_one_elsewhere_in_float32():
    net = one_pixel_kernels(settled("ssftt", patch_size=5)).float()
    image = torch.randn(1, 15, 9, 20)
    image[..., 10:] *= 100
    net.context.weights.weight.mul_(60)
    pixels = net.local(image).flatten(2).transpose(1, 2)
    logits = net.context.weights(pixels).unflatten(1, (9, 20))
    # exp(-150) is zero in float32
    assert ((logits.amax((1, 2)) - logits[:, :, :5].amax((1, 2))) > 150).any()
    centres = net(every_patch(image, 5))[:, :, 2, 2].T.unflatten(1, (9, 20))[None]
    torch.testing.assert_close(net.forward_scene(image), centres, rtol=SINGLE, atol=SINGLE)


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_ssrn_has_the_layer_table_of_its_paper():
    net = build("ssrn-published", patch_size=7, bands=200)
    sizes = {}
    net.spectral[0].register_forward_hook(lambda *a: sizes.update(spectral=a[2].shape))
    net.spatial[0].register_forward_hook(lambda *a: sizes.update(spatial=a[2].shape))
    assert net(torch.randn(2, 200, 7, 7)).shape == (2, 24)
    assert sizes == {"spectral": (2, 24, 97, 49), "spatial": (2, 24, 5, 5)}
    # Indian Pines, 16 classes: stem, 4 spectral, 1 x 1 x 97, 3 x 3 x 128, 4 spatial, norms, classifier
    convolutions = 192 + 4 * 4056 + 298_112 + 27_672 + 4 * 5208
    assert parameters(net) + 24 * 16 + 16 == convolutions + 2 * (5 * 24 + 128 + 5 * 24) + 400 == 364_168


def test_hybridsn_has_the_layer_table_of_its_paper():
    net = build("hybridsn", bands=30)
    assert [parameters(m) for m in [*net.spectral, net.spatial]] == [512, 5776, 13_856, 331_840]
    assert [m.p for m in net.head if isinstance(m, torch.nn.Dropout2d)] == [0.4, 0.4]


def test_ssftt_has_the_layer_table_of_its_paper():
    net = build("ssftt", bands=30)
    assert [parameters(m[0]) for m in (net.spectral, net.spatial)] == [224, 129_088]
    assert (net.context.weights.weight.numel(), net.context.values.weight.numel()) == (256, 4096)
    assert len(net.context.encoder) == 1


@torch.no_grad()
def test_ssrn_layout_equals_three_dimensional_convolutions():
    """The reference keeps (B, width, S, p, p) and 3-D kernels throughout."""
    net = settled("ssrn")

    def conv(layer, x):
        return F.conv3d(x, layer.weight[..., None], layer.bias, (*layer.stride, 1), (*layer.padding, 0))

    def norm(layer, x):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    patches = torch.randn(2, 15, 9, 9, dtype=torch.float64)
    stem, block1, block2, bn1, _, joint, bn2, _ = net.spectral
    x = conv(stem, patches[:, None])
    for block in (block1, block2):
        inner = conv(block.conv1, norm(block.norm1, x).relu())
        x = x + conv(block.conv2, norm(block.norm2, inner).relu())
    x = norm(bn2, conv(joint, norm(bn1, x).relu())).relu()
    torch.testing.assert_close(net.local(patches), net.spatial(x[:, :, 0]), rtol=0, atol=EXACT)


@torch.no_grad()
def test_hybridsn_layout_equals_reshape_and_two_dimensional_convolution():
    net = settled("hybridsn")
    patches = torch.randn(2, 15, 9, 9, dtype=torch.float64)
    x = patches[:, None]
    for layer in net.spectral:
        x = layer(x).relu()
    expected = F.conv2d(x.flatten(1, 2), net.spatial.weight.flatten(1, 2), net.spatial.bias, padding=1).relu()
    torch.testing.assert_close(net.local(patches), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ALL)
def test_even_patch_and_too_few_bands_are_refused_in_one_sentence(name):
    with pytest.raises(UserError, match="patch_size is 8"):
        build(name, patch_size=8)
    with pytest.raises(UserError, match="raise them to"):
        build(name, bands=2)


def test_published_form_offers_no_scene_pass():
    with pytest.raises(NotImplementedError, match="one pixel per patch"):
        build("ssrn-published").forward_scene(torch.randn(1, 15, 9, 9))
