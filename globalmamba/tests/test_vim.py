"""Vim: the mixer against its golden file, the network's promises for every choice of class token and mixer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from globalmamba.tests import golden_files
from globalmamba.tests.golden_files import golden
from globalmamba.vim import PatchTokens, Vim, VimMixer
from shared.errors import UserError

# float64 sums of a few dozen terms in another order: the bar of the golden files
EXACT = 1e-9
# a gradient that the golden file keeps in float32: half a unit in its last place
ROUNDED = 6e-8
# float32, the same operators in the same order up to their fusion
SAME = 1e-6
# bfloat16 keeps 8 bits: a few roundings of features of order one
COARSE = 5e-2

CHOICES = [(token, mixer) for token in ("last", "middle", "mean") for mixer in ("bidirectional", "causal")]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return golden_files.relative_error(got.detach(), expected.detach())


def build(image_size: int = 8, patch_size: int = 4, depth: int = 2, classes: int = 3, **choices) -> Vim:
    torch.manual_seed(0)
    tokens = PatchTokens(image_size, patch_size, embed_dim=16)
    return Vim(tokens=tokens, embed_dim=16, depth=depth, num_classes=classes, state_dim=4, **choices)


def images(batch: int = 2, size: int = 8, **options) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_mixer_matches_the_golden_file_in_output_and_all_gradients(backend):
    name = "vim_mixer_bidirectional"
    mixer = VimMixer(16, backend=backend).double()
    mixer.load_state_dict(golden(name, "param_"))
    x = golden(name, "in_")["x"].requires_grad_()
    y = mixer(x)
    y.backward(golden(name, "in_")["dy"])
    assert relative_error(y, golden(name, "out_")["y"]) < EXACT
    assert relative_error(x.grad, golden(name, "grad_")["x"]) < EXACT
    expected = golden(name, "gradparam_")
    assert set(expected) == {key for key, _ in mixer.named_parameters()}
    for key, parameter in mixer.named_parameters():
        bar = EXACT if expected[key].dtype == torch.float64 else ROUNDED
        assert relative_error(parameter.grad, expected[key]) < bar, key


def test_causal_mixer_is_the_forward_direction_alone():
    both, ahead = VimMixer(16).double(), VimMixer(16, bidirectional=False).double()
    with torch.no_grad():
        for key, parameter in ahead.named_parameters():
            parameter.copy_(both.get_parameter(key))
        # Without C and D the backward direction says nothing; the sum of the directions is halved.
        both.x_proj_b.weight.zero_()
        both.D_b.zero_()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert relative_error(2 * both(x), ahead(x)) < EXACT
    assert not any("_b" in key for key in ahead.state_dict())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_only_the_bidirectional_mixer_sees_later_tokens(bidirectional):
    torch.manual_seed(0)
    mixer = VimMixer(16, bidirectional=bidirectional).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6] += 1
    differs = (mixer(changed) - mixer(x)).abs().amax(2)[0] > 0
    assert differs.tolist() == [bidirectional] * 6 + [True] * 3


def swapped(mixer: VimMixer) -> VimMixer:
    """Return the mixer with the weights of its two directions exchanged."""
    state = mixer.state_dict()
    partners = {key: key.replace("A_log", "A_b_log").replace("D", "D_b") if "." not in key else None for key in state}
    for key in state:
        if "." in key:
            layer, name = key.split(".")
            partners[key] = f"{layer}_b.{name}"
    pairs = [(key, partner) for key, partner in partners.items() if "_b" not in key and partner in state]
    assert len(pairs) == (len(state) - 2) // 2  # all but the projections in and out
    other = VimMixer(16).to(next(iter(state.values())).dtype)
    other.load_state_dict(state | {a: state[b] for a, b in pairs} | {b: state[a] for a, b in pairs})
    return other


def test_a_reversed_order_is_the_same_bidirectional_mixer_with_its_directions_swapped():
    """So that no order of tokens can be better than its reverse; a causal mixer has one direction to read in."""
    torch.manual_seed(0)
    mixer = VimMixer(16).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert relative_error(swapped(mixer)(x.flip(1)).flip(1), mixer(x)) < EXACT
    assert relative_error(mixer(x.flip(1)).flip(1), mixer(x)) > 0.1
    ahead = VimMixer(16, bidirectional=False).double()
    assert relative_error(ahead(x.flip(1)).flip(1), ahead(x)) > 0.1


@pytest.mark.parametrize("class_token, mixer", CHOICES)
@pytest.mark.parametrize("mlp_ratio", [0.0, 2.0])
def test_every_parameter_gets_gradient(class_token, mixer, mlp_ratio):
    net = build(class_token=class_token, mixer=mixer, mlp_ratio=mlp_ratio)
    net(images()).square().sum().backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Where only the last token is read, the last block's way back has made one step, from a state of zero.
    one_step = ["layers.1.mixer.A_b_log"] if (class_token, mixer) == ("last", "bidirectional") else []
    assert still == one_step and all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("class_token, length, position", [("last", 5, 4), ("middle", 5, 2), ("mean", 4, None)])
def test_class_token_stands_where_it_is_asked_for(class_token, length, position):
    net = build(class_token=class_token, depth=0)
    features = net.forward_features(images())
    assert features.shape == (2, length, 16) and net.pos_embed.shape == (1, length, 16)
    if position is None:
        expected = net.head(features.mean(1))
    else:
        own = net.norm_f(net.cls_token + net.pos_embed[:, position : position + 1])
        assert torch.equal(features[:, position], own[:, 0].expand(2, -1))
        expected = net.head(features[:, position])
    assert torch.equal(net(images()), expected)


def test_released_form_hides_the_second_half_of_the_tokens_from_the_head():
    net = build(class_token="middle", mixer="causal").eval()
    changed = images()
    changed[:, :, 4:] += 1  # the lower two of the four patches
    assert torch.equal(net(changed), net(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["bidirectional", "causal"])
def test_reloaded_state_gives_identical_output_in_every_dtype(dtype, mixer):
    net = build(mixer=mixer).to(dtype).eval()
    other = build(mixer=mixer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other = other.to(dtype).eval()
    other.load_state_dict(net.state_dict())
    logits = net(images(dtype=dtype))
    assert logits.dtype == dtype and torch.equal(other(images(dtype=dtype)), logits)


@pytest.mark.parametrize("mixer", ["bidirectional", "causal"])
def test_bfloat16_autocast_trains_close_to_float32(mixer):
    net = build(mixer=mixer)
    exact = net(images())
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images())
        features = net.forward_features(images())
    logits.float().square().sum().backward()
    assert features.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert relative_error(logits, exact) < COARSE


@pytest.mark.parametrize("class_token, mixer", CHOICES)
def test_an_image_alone_gets_what_it_gets_in_a_batch(class_token, mixer):
    net = build(class_token=class_token, mixer=mixer).double().eval()
    batch = images(3, dtype=torch.float64)
    assert relative_error(torch.cat([net(image[None]) for image in batch]), net(batch)) < EXACT


def test_image_of_one_patch_runs():
    assert build(image_size=4, class_token="mean")(images(size=4)).shape == (2, 3)


def test_drop_path_rates_grow_linearly_and_act_in_training_only():
    net = build(depth=3, drop_path=0.5)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in net.layers]
    assert rates == [0.0, 0.25, 0.5]
    assert not torch.equal(net(images(8)), net(images(8)))
    net.eval()
    assert torch.equal(net(images(8)), net(images(8)))


def test_fresh_time_steps_lie_in_their_range_and_states_decay_at_one_to_n():
    mixer = VimMixer(64)
    for layer in (mixer.dt_proj, mixer.dt_proj_b):
        delta = F.softplus(layer.bias)
        assert 1e-3 * 0.99 < delta.min() < 2e-3 and 0.05 < delta.max() < 0.1 * 1.01
    assert torch.allclose(mixer.A_b_log.exp(), torch.arange(1.0, 17).expand(128, 16))


def test_tokens_of_a_fresh_network_have_the_variance_of_their_pixels():
    proj = Vim(tokens=PatchTokens(16, 16, 64), embed_dim=64, depth=0, num_classes=2).tokens.proj
    # 49,152 draws of variance 1 / fan in: the deviation is known to about 0.3 %, and 2 % for the cut normal
    assert proj.weight.detach().std().item() * (3 * 16 * 16) ** 0.5 == pytest.approx(1, abs=0.03)
    assert not proj.bias.any()


def test_last_map_of_every_branch_starts_smaller_in_a_deeper_network():
    def bound(net):
        return max(layer.mixer.out_proj.weight.detach().abs().max().item() for layer in net.layers)

    # uniform within 1 / sqrt(fan in), here of 32 channels, divided by the root of the number of branches
    assert 0.95 < bound(build(depth=4)) * 2 * 32**0.5 <= 1
    assert 0.95 < bound(build(depth=2, mlp_ratio=1.0)) * 2 * 32**0.5 <= 1


def test_weight_decay_leaves_states_biases_and_embeddings_alone():
    net = build()
    kept = {name for name, _ in net.named_parameters()} - net.no_weight_decay()
    assert "layers.1.mixer.A_b_log" in net.no_weight_decay() and "head.bias" in net.no_weight_decay()
    assert {name.split(".")[-2] for name in kept} == {
        "proj", "head", "norm", "norm_f", "in_proj", "out_proj",
        *(f"{name}{suffix}" for name in ("conv1d", "x_proj", "dt_proj") for suffix in ("", "_b")),
    }  # fmt: skip


def test_network_without_classes_gives_features():
    assert build(classes=0)(images()).shape == (2, 16)


@pytest.mark.parametrize("size, patch", [(8, 16), (10, 4), (8, 0)])
def test_patches_that_do_not_tile_the_image_are_refused(size, patch):
    with pytest.raises(UserError, match="multiple of patch_size"):
        PatchTokens(size, patch, 16)


def test_image_of_another_size_is_refused():
    with pytest.raises(UserError, match="resize the images"):
        build()(images(size=12))


@pytest.mark.parametrize("key", ["class_token", "mixer"])
def test_unknown_choice_is_refused(key):
    with pytest.raises(UserError, match=f"{key} 'first' is unknown: choose one of"):
        build(**{key: "first"})


def test_tokens_may_come_from_any_module_with_their_number():
    class Pooled(nn.Module):
        num_tokens = 1

        def forward(self, images):
            return images.mean((2, 3)).repeat(1, 6)[:, None, :16]

    net = Vim(tokens=Pooled(), embed_dim=16, depth=1, num_classes=2)
    assert net(images()).shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["bidirectional", "causal"])
def test_network_compiles_and_exports_without_a_break_in_its_graph(mixer):
    net = build(mixer=mixer).eval()
    expected = net(images())
    assert relative_error(torch.compile(net, backend="aot_eager", fullgraph=True)(images()), expected) < SAME
    assert relative_error(torch.export.export(net, (images(),)).module()(images()), expected) < SAME


def test_vims_own_start_sets_the_step_bias_of_the_way_back_to_zero_and_nothing_else():
    drawn, official = build(), build(initialisation="vim")
    states = drawn.state_dict(), official.state_dict()
    differing = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert differing == {f"layers.{i}.mixer.dt_proj_b.bias" for i in range(2)}
    assert not any(states[1][name].any() for name in differing)
    causal = build(mixer="causal").state_dict(), build(mixer="causal", initialisation="vim").state_dict()
    assert all(torch.equal(causal[0][name], causal[1][name]) for name in causal[0])
    with pytest.raises(UserError, match="initialisation 'zero' is unknown: choose one of mamba, vim"):
        build(initialisation="zero")


def test_with_both_directions_a_reversed_sequence_is_the_same_to_the_network_with_its_directions_swapped():
    """So no row with both directions can tell an order from its reverse; a causal one can."""
    tokens = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def swapped(name: str) -> str:
        mixer, _, rest = name.rpartition("mixer.")
        if not mixer or rest.startswith(("in_proj", "out_proj")):
            return name
        part, dot, leaf = rest.partition(".")
        pairs = {"A_log": "A_b_log", "A_b_log": "A_log"}
        partner = part.removesuffix("_b") if part.endswith("_b") else f"{part}_b"
        return f"{mixer}mixer.{pairs.get(part, partner)}{dot}{leaf}"

    network = build().double().eval()
    other = build().double().eval()
    state = network.state_dict()
    other.load_state_dict({name: state[swapped(name)] for name in state})
    with torch.no_grad():
        expected, got = network.encode(tokens), other.encode(tokens.flip(1)).flip(1)
        assert relative_error(got, expected) < EXACT
        assert relative_error(network.encode(tokens.flip(1)).flip(1), expected) > 1e-3
        causal = build(mixer="causal").double().eval()
        assert relative_error(causal.encode(tokens.flip(1)).flip(1), causal.encode(tokens)) > 1e-3
