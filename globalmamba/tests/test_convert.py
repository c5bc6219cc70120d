"""Official checkpoints load whole or are refused in one sentence; the logits are those of the official forward."""

import argparse
import math
import pickle
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from globalmamba import release_weights
from globalmamba.kernels.selective_scan import selective_scan
from globalmamba.tools import convert
from globalmamba.vim import PatchTokens, Vim
from globalmamba.vmamba import VMamba
from shared.errors import UserError

# float64 through a few blocks, sums in another order
EXACT = 1e-9

SIZES = {"tiny": 192, "small": 384}
# Published: 7 M and 26 M; exactly, these names and shapes.
NUMBERS = {"tiny": 7_148_008, "small": 25_796_584}


def official_shapes(width: int, depth: int = 24, state: int = 16, classes: int = 1000, slots: int = 197) -> dict:
    """Names and shapes of hustvl/Vim's bimambav2 models with a middle class token, patch 16."""
    inner, rank = 2 * width, math.ceil(width / 16)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, slots, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm_f.weight": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for i in range(depth):
        mixer = {"in_proj.weight": (2 * inner, width), "out_proj.weight": (width, inner)}
        for suffix in ("", "_b"):
            mixer |= {
                f"A{suffix}_log": (inner, state),
                f"D{suffix}": (inner,),
                f"conv1d{suffix}.weight": (inner, 1, 4),
                f"conv1d{suffix}.bias": (inner,),
                f"x_proj{suffix}.weight": (rank + 2 * state, inner),
                f"dt_proj{suffix}.weight": (inner, rank),
                f"dt_proj{suffix}.bias": (inner,),
            }
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"layers.{i}.norm.weight"] = (width,)
    return shapes


def official_state(dtype=torch.float32, **sizes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"width": 32, "depth": 2, "state": 4, "classes": 5, "slots": 5} | sizes
    shapes = official_shapes(**sizes)
    return {
        name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def official_logits(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The official forward by its definition: the way back is a scan of the flipped sequence."""

    def normalised(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    def direction(xz, p, suffix):
        x, z = xz.chunk(2, 1)  # (B, D, L)
        inner, length, states = x.shape[1], x.shape[2], p[f"A{suffix}_log"].shape[1]
        x = F.conv1d(x, p[f"conv1d{suffix}.weight"], p[f"conv1d{suffix}.bias"], padding=3, groups=inner)
        x = F.silu(x[..., :length])
        selected = (p[f"x_proj{suffix}.weight"] @ x).split([len(p["norm.weight"]) // 16, states, states], 1)
        return selective_scan(
            x,
            p[f"dt_proj{suffix}.weight"] @ selected[0],
            -p[f"A{suffix}_log"].exp(),
            selected[1],
            selected[2],
            p[f"D{suffix}"],
            z=z,
            delta_bias=p[f"dt_proj{suffix}.bias"],
            delta_softplus=True,
            backend="reference",
        )

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).mT
    middle = x.shape[1] // 2
    token = state["cls_token"].expand(len(x), -1, -1)
    hidden, residual = torch.cat([x[:, :middle], token, x[:, middle:]], 1) + state["pos_embed"], 0
    for i in range(sum(name.endswith("norm.weight") for name in state)):
        prefix = f"layers.{i}."
        p = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        p = {k.removeprefix("mixer."): v for k, v in p.items()}
        residual = residual + hidden
        xz = (normalised(residual, p["norm.weight"]) @ p["in_proj.weight"].T).mT
        y = direction(xz, p, "") + direction(xz.flip(-1), p, "_b").flip(-1)
        hidden = y.mT / 2 @ p["out_proj.weight"].T
    features = normalised(residual + hidden, state["norm_f.weight"])[:, middle]
    return features @ state["head.weight"].T + state["head.bias"]


def small_vim(image_size: int = 32, **choices) -> Vim:
    tokens = PatchTokens(image_size, 16, embed_dim=32)
    return Vim(tokens=tokens, embed_dim=32, depth=2, num_classes=5, state_dim=4, **choices)


def saved(path, state, **beside):
    torch.save({"model": state, **beside}, path)
    return str(path)


@pytest.mark.parametrize("size", SIZES)
def test_official_names_and_shapes_load_whole(size):
    width = SIZES[size]
    with torch.device("meta"):
        official = {name: torch.empty(shape) for name, shape in official_shapes(width).items()}
        network = Vim(tokens=PatchTokens(224, 16, width), embed_dim=width, depth=24, num_classes=1000)
    state = convert.vim_from_official(official)
    assert sum(tensor.numel() for tensor in state.values()) == NUMBERS[size]
    network.load_state_dict(state, strict=True, assign=True)
    assert {id(tensor) for tensor in state.values()} == {id(tensor) for tensor in official.values()}


def test_logits_are_those_of_the_official_forward():
    state = official_state(torch.float64)
    network = small_vim().double().eval()
    network.load_state_dict(convert.vim_from_official(state, tokens=4))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = official_logits(state, images)
    with torch.no_grad():
        assert (network(images) - expected).norm() / expected.norm() < EXACT


def test_command_converts_a_file_with_its_training_arguments_and_it_loads_again(tmp_path):
    state = official_state()
    source = saved(tmp_path / "vim.pth", state, args=argparse.Namespace(lr=1e-3), epoch=300)
    out = tmp_path / "vim.safetensors"
    assert convert.main(["vim", source, str(out), "--tokens", "4"]) == 0
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["vim.safetensors"]
    network = small_vim()
    release_weights.load_weights(network, out)
    assert torch.equal(network.layers[1].mixer.A_b_log, state["layers.1.mixer.A_b_log"])
    assert torch.equal(network.tokens.proj.bias, state["patch_embed.proj.bias"])


def test_settings_inside_a_checkpoint_are_passed_over_unread(tmp_path, monkeypatch):
    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    settings = CfgNode(lr=1e-3, nested=CfgNode(depth=2))
    settings.frozen = True
    source = saved(tmp_path / "vmamba.pth", {"weight": torch.ones(2)}, config=settings)
    monkeypatch.undo()
    assert torch.equal(release_weights.read_checkpoint(source)["weight"], torch.ones(2))


def test_causal_conversion_leaves_the_backward_direction_out_and_says_so(caplog):
    state = official_state()
    with caplog.at_level("INFO", logger="globalmamba.tools.convert"):
        converted = convert.vim_from_official(state, tokens=4, causal=True)
    assert "backward direction is left out: 14 tensors" in caplog.text
    small_vim(mixer="causal").load_state_dict(converted, strict=True)


def released_state(**sizes) -> dict[str, torch.Tensor]:
    """The release of GlobalMamba never makes a backward direction (wangck20/GlobalMamba, mamba_simple.py)."""
    state = official_state(**sizes)
    return {name: t for name, t in state.items() if not any(part in convert.BACKWARD for part in name.split("."))}


def test_the_releases_own_state_dict_has_no_backward_direction_and_converts_whole(tmp_path, caplog):
    state, out = released_state(slots=6), tmp_path / "out.safetensors"
    assert len(state) == len(official_state()) - 14
    source = saved(tmp_path / "released.pth", state)
    assert convert.main(["vim", source, str(out), "--tokens", "5", "--causal"]) == 0
    assert "left out" not in caplog.text
    tokens = convert.Slots(5, (32, 3, 16, 16))
    network = Vim(tokens=tokens, embed_dim=32, depth=2, num_classes=5, state_dim=4, mixer="causal")
    release_weights.load_weights(network, out)
    assert torch.equal(network.layers[1].mixer.A_log, state["layers.1.mixer.A_log"])


def test_the_releases_state_dict_without_causal_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="forward direction alone.*convert it with --causal"):
        convert.vim_from_official(released_state(), tokens=4)
    broken = released_state()
    del broken["layers.1.mixer.D"]
    with pytest.raises(UserError, match="causal mixer.*layers.1.mixer.D is missing.*wangck20/GlobalMamba"):
        convert.vim_from_official(broken, tokens=4, causal=True)


def test_position_embedding_is_never_resized_in_silence():
    with pytest.raises(UserError, match=r"position embedding is \(1, 5, 32\).*--tokens"):
        convert.vim_from_official(official_state(), tokens=9)


@pytest.mark.parametrize(
    "name, words",
    [
        ("head.bias", "head.bias is missing"),
        ("layers.1.mixer.A_b_log", "layers.1.mixer.A_b_log is missing"),
        ("layers.0.mixer.A_log", "the checkpoint is no Vim"),
        ("pos_embed", "pos_embed is missing"),
    ],
)
def test_missing_tensor_is_named(name, words):
    state = official_state()
    del state[name]
    with pytest.raises(UserError, match=words):
        convert.vim_from_official(state, tokens=4)


def test_unknown_tensor_and_wrong_shape_are_named():
    state = official_state()
    with pytest.raises(UserError, match="layers.0.gamma is unknown"):
        convert.vim_from_official(state | {"layers.0.gamma": torch.ones(32)}, tokens=4)
    with pytest.raises(UserError, match=r"x_proj_b.weight is \(3, 64\) instead of \(10, 64\)"):
        convert.vim_from_official(state | {"layers.0.mixer.x_proj_b.weight": torch.ones(3, 64)}, tokens=4)


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path):
    out = tmp_path / "vim.safetensors"
    release_weights.write_weights(convert.vim_from_official(official_state(), tokens=4), out)
    network = small_vim(image_size=48)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=r"pos_embed is \(1, 5, 32\) instead of \(1, 10, 32\)"):
        release_weights.load_weights(network, out)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    with pytest.raises(UserError, match="cannot be read"):
        release_weights.load_weights(network, tmp_path / "absent.safetensors")


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b"PK no archive"), "no PyTorch checkpoint or is cut short"),
        (lambda path: path.write_bytes(b""), "no PyTorch checkpoint or is cut short"),
        (lambda path: path.write_bytes(pickle.dumps({"model": Harmful()}, 2)), "only running its code"),
        (lambda path: torch.save({"model": Harmful()}, path), "only running its code"),
        (lambda path: torch.save([1, 2], path), "no state dict"),
        (lambda path: torch.save({"model": {"epoch": 3}}, path), "no state dict"),
        (lambda path: torch.save({"fc.weight": torch.ones(2)}, path), "is no Vim"),
    ],
)
def test_bad_source_is_one_sentence_and_exit_code_2(tmp_path, caplog, write, words):
    source, out = tmp_path / "source.pth", tmp_path / "out.safetensors"
    write(source)
    assert convert.main(["vim", str(source), str(out)]) == 2
    assert words in caplog.text and caplog.text.count("\n") == 1
    assert not out.exists()


def test_nothing_is_overwritten(tmp_path, caplog):
    source, out = saved(tmp_path / "vim.pth", official_state()), tmp_path / "out.safetensors"
    out.write_bytes(b"kept")
    assert convert.main(["vim", source, str(out), "--tokens", "4"]) == 2
    assert "is there already" in caplog.text and out.read_bytes() == b"kept"
    assert convert.main(["vim", source, str(tmp_path / "out.pth"), "--tokens", "4"]) == 2
    assert not (tmp_path / "out.pth").exists()


def test_vmamba_is_converted_by_the_same_command(tmp_path):
    # What its own converter refuses is tested with the network.
    sizes = {"num_classes": 5, "depths": (1, 1), "dims": 8, "ssm_ratio": 1.0}
    state = VMamba(**sizes).state_dict()
    out = tmp_path / "out.safetensors"
    assert convert.main(["vmamba", saved(tmp_path / "vmamba.pth", state), str(out)]) == 0
    network = VMamba(**sizes)
    release_weights.load_weights(network, out)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def averaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in state.items()}


@pytest.mark.parametrize(
    "options, key, words",
    [([], 0, "the weights as trained"), (["--weights", "ema"], 1, "the moving average of the weights")],
)
def test_the_weights_as_trained_or_their_average_are_taken_and_named(tmp_path, caplog, options, key, words):
    state = official_state()
    source = saved(tmp_path / "vim.pth", state, model_ema=averaged(state), epoch=299)
    out = tmp_path / "out.safetensors"
    with caplog.at_level("INFO", logger=convert.__name__):
        assert convert.main(["vim", source, str(out), "--tokens", "4", *options]) == 0
    assert f"{out}: {words}, " in caplog.text and caplog.text.count("\n") == 1
    network = small_vim()
    release_weights.load_weights(network, out)
    assert torch.equal(network.head.bias, (state, averaged(state))[key]["head.bias"])


@pytest.mark.parametrize("average", [{}, {"model_ema": None}])
def test_an_average_that_a_checkpoint_does_not_hold_is_refused_in_one_sentence(tmp_path, caplog, average):
    source, out = saved(tmp_path / "vim.pth", official_state(), **average), tmp_path / "out.safetensors"
    assert convert.main(["vim", source, str(out), "--weights", "ema"]) == 2
    assert "holds no moving average (model_ema or state_dict_ema)" in caplog.text and caplog.text.count("\n") == 1
    assert "--weights model" in caplog.text and not out.exists()


def test_the_average_of_vmamba_is_taken_too(tmp_path):
    sizes = {"num_classes": 5, "depths": (1, 1), "dims": 8, "ssm_ratio": 1.0}
    state, out = VMamba(**sizes).state_dict(), tmp_path / "out.safetensors"
    source = saved(tmp_path / "vmamba.pth", state, model_ema=averaged(state))
    assert convert.main(["vmamba", source, str(out), "--weights", "ema"]) == 0
    network = VMamba(**sizes)
    release_weights.load_weights(network, out)
    assert torch.equal(network.classifier["head"].bias, state["classifier.head.bias"] + 1)
