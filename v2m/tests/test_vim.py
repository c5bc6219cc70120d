"""Vim and V2M's network: sizes, class tokens, positions, what dense tasks ask for, for either mixer."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.errors import UserError
from v2m.mixer import ReleasedMixer, V2MMixer
from v2m.vim import CLASS_TOKENS, Vim, VimMixer

# float32, the same operators in the same order up to their fusion
SAME = 1e-6
# bfloat16 keeps 8 bits: a few roundings of features of order one
COARSE = 5e-2
# Parameters with 1,000 classes, in millions: of the official Vim (hustvl/Vim) and of V2M's release, by their code.
OFFICIAL = {"vim": {192: 7.15, 384: 25.80}, "v2m": {192: 6.85, 384: 25.21}}

MIXERS = {"vim": VimMixer, "v2m": V2MMixer}


def fits(mixer: str, class_token: str) -> bool:
    """Say whether a mixer takes a class token: one of the plane does not take a sequence."""
    return mixer == "vim" or class_token not in ("middle", "edge")


PAIRS = [(mixer, token) for mixer in MIXERS for token in CLASS_TOKENS if fits(mixer, token)]


def build(mixer="v2m", image_size=(8, 12), depth=2, classes=3, **choices) -> Vim:
    torch.manual_seed(0)
    part = functools.partial(MIXERS.get(mixer, mixer), state_dim=4)
    return Vim(
        image_size=image_size, patch_size=2, embed_dim=16, depth=depth, num_classes=classes, mixer=part, **choices
    )


def images(*size, batch=2, **options) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize("width", [192, 384])
@pytest.mark.parametrize("name", MIXERS)
def test_networks_have_the_parameters_of_the_official_ones(name, width):
    with torch.device("meta"):
        network = Vim(
            image_size=224,
            patch_size=16,
            embed_dim=width,
            depth=24,
            num_classes=1000,
            mixer=MIXERS[name],
            class_token="middle" if name == "vim" else "mean",
        )
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == OFFICIAL[name][width]


@pytest.mark.parametrize("size", [(8, 12), (2, 12), (8, 2), (2, 2), (6, 14)])
@pytest.mark.parametrize(("mixer", "class_token"), PAIRS)
def test_any_size_gives_logits_and_a_map_of_features(mixer, class_token, size):
    network = build(mixer, class_token=class_token).eval()
    with torch.no_grad():
        assert network(images(*size)).shape == (2, 3)
        features = network.forward_features(images(*size))
    assert features.shape == (2, 16, size[0] // 2, size[1] // 2) and features.isfinite().all()


@pytest.mark.parametrize(("mixer", "class_token"), PAIRS)
def test_every_parameter_gets_a_gradient(mixer, class_token):
    network = build(mixer, class_token=class_token, mlp_ratio=2.0)
    network(images(8, 12)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Behind the last block the head reads one class token alone; where it ends the sequence, the way back starts at it
    # and has no past there.
    no_past = {("vim", "edge"): ["layers.1.mixer.A_b_log"], ("vim", "edge_cross"): ["layers.1.mixer.A_b_log"]}
    assert without == no_past.get((mixer, class_token), [])


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
def test_positions_are_unchanged_at_the_own_size_and_smooth_at_another(class_token):
    network = build("vim", class_token=class_token, image_size=8)
    assert network._positions((4, 4)).data_ptr() == network.pos_embed.data_ptr()
    with torch.no_grad():
        grid = torch.full((1, 4, 4, 16), 3.0)
        tokens = None if network.cls_token is None else torch.full_like(network.cls_token, 5.0)
        network.pos_embed.copy_(network.with_class_tokens(grid, tokens).flatten(1, 2))
        patches, own = network.without_class_tokens(network._positions((5, 7)), (5, 7))
    torch.testing.assert_close(patches, torch.full((1, 5, 7, 16), 3.0))
    assert own.shape[1] == {"mean": 0, "middle": 1, "edge": 1}.get(class_token, 13)
    torch.testing.assert_close(own, torch.full_like(own, 5.0))


@pytest.mark.parametrize(
    ("class_token", "expected"),
    [
        ("mean", [[0, 1], [2, 3], [4, 5]]),
        ("middle", [[0, 1, 2, 10, 3, 4, 5]]),
        ("edge", [[0, 1, 2, 3, 4, 5, 10]]),
        ("edge_cross", [[0, 1, 12], [2, 3, 13], [4, 5, 14], [10, 11, 15]]),
        ("middle_cross", [[0, 12, 1], [10, 13, 11], [2, 14, 3], [4, 15, 5]]),
    ],
)
def test_class_tokens_stand_where_their_names_say(class_token, expected):
    network = build("vim", image_size=(6, 4), class_token=class_token)
    grid = torch.arange(6.0).view(1, 3, 2, 1)
    tokens = None if class_token == "mean" else torch.arange(10.0, 10 + network.cls_token.shape[1]).view(1, -1, 1)
    placed = network.with_class_tokens(grid, tokens)
    assert placed[0, :, :, 0].tolist() == expected
    patches, own = network.without_class_tokens(placed, (3, 2))
    assert patches.equal(grid) and (own.shape[1] == 0 if tokens is None else own.equal(tokens))


@pytest.mark.parametrize(
    ("class_token", "read"), [("middle", 24), ("edge", 24), ("edge_cross", 34), ("middle_cross", 17)]
)
def test_the_head_reads_one_class_token_the_crossing_one(class_token, read):
    network = build("vim", class_token=class_token)  # a grid of 4 x 6
    network.layers, network.norm_f = nn.ModuleList(), nn.Identity()
    if class_token.endswith("cross"):
        numbers = torch.arange(35.0).view(1, 5, 7)
        network._positions = lambda size: numbers[..., None].expand(-1, -1, -1, 16)
        network.cls_token.data.zero_()
    else:
        network._positions = lambda size: torch.zeros(1, 1, 1, 16)
        network.cls_token.data.fill_(24.0)
    network.head = nn.Identity()
    assert (network(images(8, 12)) == read).all()


def test_one_class_token_makes_the_grid_one_row_and_a_cross_keeps_it_a_grid():
    seen = []

    class Watch(nn.Module):
        def __init__(self, embed_dim, layer, backend, state_dim):
            super().__init__()
            self.out_proj = nn.Linear(embed_dim, embed_dim)

        def forward(self, grid):
            seen.append(tuple(grid.shape[1:3]))
            return self.out_proj(grid)

    for name in CLASS_TOKENS:
        build(Watch, class_token=name, depth=1)(images(8, 12))
    assert seen == [(4, 6), (1, 25), (1, 25), (5, 7), (5, 7)]


@pytest.mark.parametrize("class_token", ["middle", "edge"])
def test_a_mixer_of_the_plane_refuses_a_sequence(class_token):
    with pytest.raises(UserError, match=f"makes the grid one row.* choose {class_token}_cross or mean"):
        build("v2m", class_token=class_token)


def test_the_stream_is_float32_whatever_the_blocks_compute_in():
    network = build().to(torch.bfloat16)
    kinds = []
    for layer in network.layers:
        layer.register_forward_hook(lambda *a: kinds.append(a[-1].dtype))
    with torch.no_grad():
        features = network.forward_features(images(8, 12, dtype=torch.bfloat16))
        expected = build().forward_features(images(8, 12))
    assert kinds == [torch.float32] * 2
    assert (features.float() - expected).norm() < COARSE * expected.norm()


def test_compiled_by_torch_it_gives_the_same():
    network = build(backend="chunked").eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(8, 12)), network(images(8, 12)), rtol=SAME, atol=SAME)


def test_an_image_scores_the_same_alone_and_in_a_batch():
    network = build().eval()
    with torch.no_grad():
        together = network(images(8, 12, batch=3))
        alone = torch.cat([network(one[None]) for one in images(8, 12, batch=3)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_one_projection_serves_four_corners_and_the_release_takes_four():
    def products(mixer) -> int:
        """Multiply-adds of the linear maps on a grid of 4 x 4, of V2M's mixer in_proj alone."""
        part = mixer(16, state_dim=4, backend="chunked")
        with FlopCounterMode(display=False, depth=3) as counter, torch.no_grad():
            part.project_in(torch.zeros(1, 4, 4, 16)) if mixer is V2MMixer else part(torch.zeros(1, 4, 4, 16))
        products = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        return sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if name in products) // 2

    own = products(V2MMixer)
    assert own == 16 * 16 * 64
    released = ReleasedMixer(16, state_dim=4, backend="chunked")
    weights = [w for n, w in released.named_parameters() if n.endswith("proj.weight") or n.endswith("proj_2.weight")]
    tokens = [16 if w is released.out_proj.weight else 4 * 16 for w in weights]
    assert products(ReleasedMixer) == sum(n * w.numel() for n, w in zip(tokens, weights, strict=True))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"class_token": "first"}, "class_token 'first' is unknown"),
        ({"image_size": 9}, "patches of 2 do not tile an image of 9 x 9"),
        ({"image_size": (8, 0)}, "do not tile an image of 8 x 0"),
        ({"depth": 0}, "depth 0, drop_path 0.0, drop_rate 0.0: give 1 block or more"),
        ({"drop_path": 2.0}, "rates of 0 or more, below 1"),
    ],
)
def test_wrong_choices_are_refused_in_one_sentence(choices, words):
    with pytest.raises(UserError, match=words):
        build(**choices)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((2, 1, 8, 12), r"takes images \(B, 3, height, width\)"), ((2, 3, 8, 11), "do not tile an image of 8 x 11")],
)
def test_images_that_do_not_fit_are_refused_in_one_sentence(shape, words):
    with pytest.raises(UserError, match=words):
        build()(torch.zeros(shape))


@pytest.mark.parametrize(("mixer", "suffix"), [("vim", "_b"), (ReleasedMixer, "_2")])
def test_the_releases_start_sets_the_step_bias_of_the_second_pass_to_zero_and_nothing_else(mixer, suffix):
    choices = {"mixer": mixer, "image_size": 8}
    states = build(**choices).state_dict(), build(**choices, initialisation="vim").state_dict()
    differing = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert differing == {f"layers.{i}.mixer.dt_proj{suffix}.bias" for i in range(2)}
    assert not any(states[1][name].any() for name in differing)
    with pytest.raises(UserError, match="initialisation 'zero' is unknown: choose one of mamba, vim"):
        build(**choices, initialisation="zero")
