"""A checkpoint of V2M's own release loads whole into the network as released, or is refused in one sentence."""

import argparse
import functools
import math

import pytest
import torch
from torch.nn import functional as F

from shared.claims.compose import row_config
from shared.errors import UserError
from v2m import release_weights
from v2m.mixer import ReleasedMixer
from v2m.model import build_model
from v2m.tests.golden_files import golden
from v2m.tools import convert
from v2m.vim import Vim, VimMixer

EXACT = 1e-9  # float64 through a few blocks, sums in another order
ROWS = {"v2m-in1k-t-released": 192, "v2m-in1k-s-released": 384}
SIZES = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


def released_shapes(width: int, depth: int, state: int, classes: int, side: int, patch: int) -> dict:
    """Names and shapes of wangck20/V2M's bimamba2d models: ``VisionMamba`` (v2m/models_mamba.py) without a class token,
    its mixer ``Mamba`` (mamba_simple.py)."""
    inner, rank = 2 * width, math.ceil(width / 16)
    shapes = {
        "pos_embed": (1, side**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
        "norm_f.weight": (width,),
    }
    for i in range(depth):
        mixer = {
            "A_log": (inner, state),
            "D": (inner,),
            "A_2_log": (inner, state),
            "D_2": (inner,),
            "in_proj.weight": (2 * inner, width),
            "conv1d.weight": (inner, 1, 4),
            "conv1d.bias": (inner,),
            "x_proj.weight": (rank + state, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "conv1d_2.weight": (inner, 1, 4),
            "conv1d_2.bias": (inner,),
            "x_proj_2.weight": (rank + state, inner),
            "dt_proj_2.weight": (inner, rank),
            "dt_proj_2.bias": (inner,),
            "out_proj.weight": (width, inner),
        }
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"layers.{i}.norm.weight"] = (width,)
    return shapes


def small_network() -> Vim:
    """A network as released, of two blocks, no parameter at a value that another could have too."""
    torch.manual_seed(0)
    network = Vim(**SIZES, mixer=functools.partial(ReleasedMixer, state_dim=4))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def as_released(network: Vim) -> dict[str, torch.Tensor]:
    """Return a network's tensors under the release's names, each taken from where it is used here."""
    state = {
        "patch_embed.proj.weight": network.patch_embed.proj.weight,
        "patch_embed.proj.bias": network.patch_embed.proj.bias,
        "pos_embed": network.pos_embed,
        "norm_f.weight": network.norm_f.weight,
        "head.weight": network.head.weight,
        "head.bias": network.head.bias,
    }
    for i, block in enumerate(network.layers):
        mixer = block.mixer
        rows = [mixer.A_log, mixer.D, mixer.conv1d, mixer.x_proj, mixer.dt_proj]
        columns = [mixer.A_2_log, mixer.D_2, mixer.conv1d_2, mixer.x_proj_2, mixer.dt_proj_2]
        state[f"layers.{i}.norm.weight"] = block.norm.weight
        state[f"layers.{i}.mixer.in_proj.weight"] = mixer.in_proj.weight
        state[f"layers.{i}.mixer.out_proj.weight"] = mixer.out_proj.weight
        for suffix, (A_log, D, conv, x_proj, dt_proj) in (("", rows), ("_2", columns)):
            state[f"layers.{i}.mixer.A{suffix}_log"] = A_log
            state[f"layers.{i}.mixer.D{suffix}"] = D
            state[f"layers.{i}.mixer.conv1d{suffix}.weight"] = conv.weight
            state[f"layers.{i}.mixer.conv1d{suffix}.bias"] = conv.bias
            state[f"layers.{i}.mixer.x_proj{suffix}.weight"] = x_proj.weight
            state[f"layers.{i}.mixer.dt_proj{suffix}.weight"] = dt_proj.weight
            state[f"layers.{i}.mixer.dt_proj{suffix}.bias"] = dt_proj.bias
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def released_logits(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The release's forward around its mixer, which is held to a golden file of its own (test_mixer.py)."""

    def normalised(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    hidden, residual = x.flatten(2).mT + state["pos_embed"], 0
    side = math.isqrt(hidden.shape[1])
    for i in range(2):
        mixer = ReleasedMixer(32, state_dim=4, backend="reference").double()
        prefix = f"layers.{i}.mixer."
        mixer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        residual = residual + hidden
        hidden = mixer(normalised(residual, state[f"layers.{i}.norm.weight"]).unflatten(1, (side, side))).flatten(1, 2)
    features = normalised(residual + hidden, state["norm_f.weight"]).mean(1)
    return features @ state["head.weight"].T + state["head.bias"]


def test_the_mixers_names_are_those_of_the_releases_golden_file():
    shapes = released_shapes(width=16, depth=1, state=16, classes=1, side=1, patch=1)
    prefix = "layers.0.mixer."
    expected = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    assert {name: t.shape for name, t in golden("v2m_mixer_as_released", "param_").items()} == expected


@pytest.mark.parametrize("row", ROWS)
def test_the_releases_names_and_shapes_load_whole_into_its_row(row):
    shapes = released_shapes(ROWS[row], depth=24, state=16, classes=1000, side=14, patch=16)
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in shapes.items()}
        network = build_model(row_config("v2m", row, 0))
    state = convert.v2m_from_official(released)
    network.load_state_dict(state, strict=True, assign=True)
    assert {id(tensor) for tensor in state.values()} == {id(tensor) for tensor in released.values()}


@torch.no_grad()
def test_a_released_checkpoint_gives_the_networks_outputs(tmp_path):
    network = small_network()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # What the release's main.py saves, beside its optimiser and schedule.
    source, out = tmp_path / "checkpoint.pth", tmp_path / "v2m.safetensors"
    torch.save({"model": as_released(network), "epoch": 299, "args": argparse.Namespace(lr=5e-4)}, source)
    assert convert.main(["v2m", str(source), str(out), "--image-size", "32"]) == 0
    other = Vim(**SIZES, mixer=functools.partial(ReleasedMixer, state_dim=4)).eval()
    assert not torch.equal(other(images), network(images))
    release_weights.load_weights(other, out)
    assert torch.equal(other(images), network(images))


@torch.no_grad()
def test_logits_are_those_of_the_releases_forward():
    network = small_network().double()
    state = as_released(network)
    other = Vim(**SIZES, mixer=functools.partial(ReleasedMixer, state_dim=4)).double().eval()
    other.load_state_dict(convert.v2m_from_official(state, 32))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = released_logits(state, images)
    assert (other(images) - expected).norm() / expected.norm() < EXACT


def without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    "change, words",
    [
        (without("layers.1.mixer.D_2"), "is no V2M as released: layers.1.mixer.D_2 is missing"),
        (without("layers.0.mixer.A_2_log"), "is no V2M as released .*A_2_log.* is not as in one"),
        (without("head.weight"), "is no V2M as released .*head.weight.* is not as in one"),
        (without("norm_f.weight"), "norm_f.weight is missing"),
        (without("pos_embed"), "pos_embed is missing"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 17, 32)), r"position embedding is \(1, 17, 32\).*--image-size"),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 32)), "cls_token is unknown; give one of wangck20/V2M"),
        (lambda s: s.update({"layers.0.mixer.gamma": torch.zeros(32)}), "layers.0.mixer.gamma is unknown"),
        (
            lambda s: s.update({"layers.1.mixer.x_proj_2.weight": torch.zeros(10, 64)}),
            r"layers.1.mixer.x_proj_2.weight is \(10, 64\) instead of \(6, 64\)",
        ),
    ],
)
def test_wrong_and_missing_tensors_are_one_sentence(change, words):
    state = as_released(small_network())
    change(state)
    with pytest.raises(UserError, match=words) as error:
        convert.v2m_from_official(state, 32)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_vim_is_refused_by_the_command(tmp_path, caplog):
    source, out = tmp_path / "vim.pth", tmp_path / "out.safetensors"
    vim = Vim(**SIZES, mixer=functools.partial(VimMixer, state_dim=4), class_token="middle")
    torch.save({"model": vim.state_dict()}, source)
    assert convert.main(["v2m", str(source), str(out), "--image-size", "32"]) == 2
    assert "the checkpoint is no V2M as released" in caplog.text and caplog.text.count("\n") == 1
    assert not out.exists()
