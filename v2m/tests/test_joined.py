"""The corners joined once, in front of the blocks: what each copy sees, turning, sizes, refusals."""

import functools

import pytest
import torch

from shared.claims.compose import compose
from shared.errors import UserError
from v2m.joined import JOINS, JoinedVim
from v2m.mixer import V2MMixer
from v2m.model import build_model
from v2m.vim import Vim, VimMixer

EXACT = 1e-9  # float64 sums in another order
SIZES = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_classes": 5}


def build(cls=JoinedVim, corners=1, **options):
    torch.manual_seed(0)
    network = cls(**SIZES | options, mixer=functools.partial(V2MMixer, state_dim=4, corners=corners)).double().eval()
    with torch.no_grad():
        for block in network.layers:
            for name in ("dt_proj", "dt_proj_2"):
                getattr(block.mixer, name).bias.fill_(0.5)  # steps of about one: what lies far away is seen
    return network


def tokens(batch=2):
    return torch.randn(batch, 4, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT)


def test_joined_as_images_is_the_mean_of_one_corner_on_the_four_turned_grids():
    joined, grid = build(join="images"), tokens()
    one = build(Vim)
    one.load_state_dict(joined.state_dict())
    turned = [one.encode(grid.rot90(turn, (1, 2))).rot90(-turn, (1, 2)) for turn in range(4)]
    same(joined.encode(grid), torch.stack(turned).mean(0))


def test_turning_the_tokens_turns_what_images_joined_give():
    joined, grid = build(join="images"), tokens()
    same(joined.encode(grid.rot90(1, (1, 2))), joined.encode(grid).rot90(1, (1, 2)))


def test_joined_by_channels_the_blocks_see_a_linear_map_of_the_turned_tokens():
    joined, grid = build(join="channels"), tokens()
    one = build(Vim)
    one.load_state_dict({k: v for k, v in joined.state_dict().items() if k != "corner_proj.weight"})
    parts = joined.corner_proj.weight.chunk(4, 1)
    mapped = sum(grid.rot90(turn, (1, 2)) @ part.T for turn, part in enumerate(parts))
    same(joined.encode(grid), one.encode(mapped))


def test_as_images_the_first_token_sees_the_whole_plane_and_by_channels_its_four_corners_alone():
    """By channels a place holds what turning brings there: scans from one corner begin at all four at once."""
    grid, everything = tokens(1).requires_grad_(), torch.ones(4, 4, dtype=torch.bool)
    corners, own = torch.zeros_like(everything), torch.zeros_like(everything)
    corners[::3, ::3] = own[0, 0] = True
    for network, seen in ((build(join="images"), everything), (build(join="channels"), corners), (build(Vim), own)):
        (gradient,) = torch.autograd.grad(network.encode(grid)[0, 0, 0, 0], grid)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, seen)


@pytest.mark.parametrize("join", JOINS)
def test_images_have_logits_and_every_parameter_a_gradient(join):
    network = build(join=join)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = network(images)
    logits.square().sum().backward()
    assert logits.shape == (2, 5)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())
    assert network.forward_features(torch.zeros(1, 3, 12, 12, dtype=torch.float64)).shape == (1, 8, 6, 6)


@pytest.mark.parametrize("join", JOINS)
def test_the_configuration_builds_it(join):
    overrides = ["model=v2m-t-joined", f"model.network.join={join}", "data.image_size=32"]
    network = build_model(compose("v2m", [*overrides, "model.network.depth=1"]))
    assert isinstance(network, JoinedVim) and network.join == join


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"join": "woven"}, "join 'woven' is unknown: choose one of images, channels"),
        ({"join": "images", "corners": 4}, "of V2M's mixer, corners 1"),
        ({"join": "channels", "class_token": "edge_cross"}, "no place for class tokens"),
    ],
)
def test_choices_that_do_not_fit_are_one_sentence(options, words):
    with pytest.raises(UserError, match=words):
        build(**options)


def test_a_mixer_without_corners_and_a_grid_that_is_no_square_are_refused():
    with pytest.raises(UserError, match="leave one to each block"):
        JoinedVim(join="images", **SIZES, mixer=VimMixer)
    with pytest.raises(UserError, match="square grids only, got 4 x 6"):
        build(join="channels")(torch.zeros(1, 3, 8, 12, dtype=torch.float64))
