"""V2M's mixer: the plane that the release gets wrong, the release itself against its golden file, the options."""

import pytest
import torch
from torch.nn import functional as F

from shared.errors import UserError
from v2m.kernels.scan2d import scan2d
from v2m.mixer import ReleasedMixer, V2MMixer
from v2m.roesser_mixer import RoesserMixer
from v2m.tests.golden_files import golden, relative_error
from v2m.vim import VimMixer
from v2m.windows import from_windows, to_windows

# float64 sums of a few dozen terms in another order: the bar of the golden files
EXACT = 1e-9
# a gradient that the golden file keeps in float32: half a unit in its last place
ROUNDED = 6e-8

CORNERS = ("top left", "bottom left", "top right", "bottom right")
E = 8


def build(cls=V2MMixer, **options):
    torch.manual_seed(0)
    mixer = cls(E, state_dim=4, **options).double()
    with torch.no_grad():
        for name in ("dt_proj", "dt_proj_2"):
            getattr(mixer, name).bias.fill_(0.5)  # steps of about one: what lies far away is seen, and fades
    return mixer


def grid(height, width, batch=2):
    return torch.randn(batch, height, width, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT)


def influence(function, tokens) -> torch.Tensor:
    """Return which token (last two axes) has influence on which output (first two), a bool tensor (H, W, H, W)."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x[None])[0].sum(-1), tokens[0])
    return jacobian.abs().sum(-1) > 0


def identity_scans(mixer):
    """Make every scan and convolution look at its own token alone: no memory of what was passed."""
    with torch.no_grad():
        for suffix in ("", "_2"):
            conv = getattr(mixer, f"conv1d{suffix}")
            conv.weight.zero_()
            conv.weight[..., -1] = 1
            conv.bias.zero_()
            getattr(mixer, f"x_proj{suffix}").weight[mixer.rank :] = 0
    return mixer


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("name", "cls", "shape"),
    [("v2m_mixer_as_released", ReleasedMixer, (2, 5, 5, 16)), ("vim_mixer_bidirectional", VimMixer, (2, 4, 6, 16))],
)
def test_mixers_match_their_golden_files_in_output_and_all_gradients(name, cls, shape, backend):
    mixer = cls(16, backend=backend).double()
    mixer.load_state_dict(golden(name, "param_"))
    x = golden(name, "in_")["x"].requires_grad_()
    y = mixer(x.view(shape)).reshape(x.shape)
    y.backward(golden(name, "in_")["dy"])
    assert relative_error(y, golden(name, "out_")["y"]) < EXACT
    assert relative_error(x.grad, golden(name, "grad_")["x"]) < EXACT
    expected = golden(name, "gradparam_")
    assert set(expected) == {key for key, _ in mixer.named_parameters()}
    for key, parameter in mixer.named_parameters():
        bar = EXACT if expected[key].dtype == torch.float64 else ROUNDED
        assert relative_error(parameter.grad, expected[key]) < bar, key


def test_with_scans_that_remember_nothing_every_token_stays_in_its_place():
    tokens = grid(3, 5)
    mixer = identity_scans(build())
    x, gate = mixer.project_in(tokens)
    p = F.silu(x) * gate
    expected = mixer.out_proj(4 * (F.silu(p) * gate)[:, 0] / 2)  # four equal corners, D = 1
    same(mixer(tokens), expected)
    own = torch.eye(15, dtype=torch.bool).view(3, 5, 3, 5)
    assert torch.equal(influence(mixer, tokens), own)


def test_the_release_puts_tokens_in_transposed_places():
    """Held as it is: its four branches look at the token across the diagonal, or at the one mirrored as well."""
    seen = influence(identity_scans(build(ReleasedMixer)), grid(3, 3))
    i, j = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    expected = torch.zeros(3, 3, 3, 3, dtype=torch.bool)
    expected[i, j, j, i] = True  # ahead
    expected[i, j, 2 - j, i] = True  # back
    expected[i, j, j, 2 - i] = True
    own = expected[i, j, i, j]
    assert not own.all()
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_mirroring_the_input_mirrors_the_output_of_four_corners(axis):
    mixer, tokens = build(), grid(4, 6)
    same(mixer(tokens.flip(axis)), mixer(tokens).flip(axis))
    assert not torch.allclose(build(ReleasedMixer)(grid(4, 4).flip(axis)), build(ReleasedMixer)(grid(4, 4)).flip(axis))


def test_turning_the_input_turns_the_output_of_the_rotated_order_alone():
    tokens, mixer = grid(4, 6), build(order="rotated")
    same(mixer(tokens.rot90(1, (1, 2))), mixer(tokens).rot90(1, (1, 2)))
    rows_first = build()
    assert not torch.allclose(rows_first(tokens.rot90(1, (1, 2))), rows_first(tokens).rot90(1, (1, 2)))
    own = rows_first.corner_branches(*rows_first.project_in(tokens))
    turned = mixer.corner_branches(*mixer.project_in(tokens))
    same(turned[:, 0], own[:, 0])  # top left
    same(turned[:, 2], own[:, 3])  # bottom right


def test_the_rotated_order_is_the_sum_over_inputs_rotated_scanned_and_rotated_back():
    """Eqs 13-15 as they read: rot, the 2-D model from the top left alone, rot back, sum, one linear map."""
    mixer, tokens = build(order="rotated"), grid(4, 6).requires_grad_()

    def from_the_top_left(turned):
        x, gate = mixer.project_in(turned)
        rows = mixer.run_pass(x, ("right",), ("",), "B") * gate
        return (mixer.run_pass(rows, ("down",), ("_2",), "C") * gate)[:, 0]

    total = sum(from_the_top_left(tokens.rot90(k, (1, 2))).rot90(-k, (1, 2)) for k in range(4))
    expected = F.linear(total, mixer.out_proj.weight) / 2
    results, weights = [mixer(tokens), expected], torch.randn(tokens.shape, dtype=torch.float64)
    same(*results)
    inputs = [tokens, *mixer.parameters()]
    for got, wanted in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in results), strict=True):
        same(got, wanted)
    assert not torch.allclose(build()(tokens), expected), "rows first from every corner is another model"


def test_mirroring_the_input_exchanges_the_corners():
    mixer, tokens = build(), grid(4, 6)
    x, gate = mixer.project_in(tokens)
    branches = mixer.corner_branches(x, gate)
    left_right = mixer.corner_branches(x.flip(3), gate.flip(3)).flip(3)
    up_down = mixer.corner_branches(x.flip(2), gate.flip(2)).flip(2)
    same(left_right, branches[:, [2, 3, 0, 1]])
    same(up_down, branches[:, [1, 0, 3, 2]])


def test_one_corner_is_not_symmetric_and_two_are_symmetric_about_the_centre():
    tokens = grid(4, 6)
    one, two = build(corners=1), build(corners=2)
    assert not torch.allclose(one(tokens.flip(1, 2)), one(tokens).flip(1, 2))
    same(two(tokens.flip(1, 2)), two(tokens).flip(1, 2))
    assert not torch.allclose(two(tokens.flip(1)), two(tokens).flip(1))


def test_swapping_height_and_width_swaps_the_roles_of_rows_and_columns():
    """Columns first on the grid is rows first on the transposed grid, with the same parameters."""
    mixer, tokens = build(), grid(3, 5)

    def columns_first(x, gate):
        columns = mixer.run_pass(x, ("down", "up"), ("",), "B") * gate
        return mixer.run_pass(columns, ("right", "left", "right", "left"), ("_2",), "C")

    x, gate = mixer.project_in(tokens)
    turned = mixer.corner_branches(x.transpose(2, 3), gate.transpose(2, 3))
    same(columns_first(x, gate), turned.transpose(2, 3))
    assert not torch.allclose(columns_first(x, gate), mixer.corner_branches(x, gate)[:, [0, 2, 1, 3]])


@pytest.mark.parametrize("number", range(4))
def test_a_corner_sees_the_rectangle_between_it_and_the_token_and_nothing_else(number):
    mixer, (height, width) = build(), (4, 5)

    def branch(tokens):
        return mixer.corner_branches(*mixer.project_in(tokens))[:, number]

    seen = influence(branch, grid(height, width))
    i, j, a, b = torch.meshgrid(*(torch.arange(n) for n in (height, width, height, width)), indexing="ij")
    above = a <= i if CORNERS[number].startswith("top") else a >= i
    beside = b <= j if CORNERS[number].endswith("left") else b >= j
    assert torch.equal(seen, above & beside)


def test_four_corners_see_the_whole_plane_and_the_parallel_scans_only_a_cross():
    tokens = grid(4, 5)
    assert influence(build(), tokens).all()
    i, j, a, b = torch.meshgrid(*(torch.arange(n) for n in (4, 5, 4, 5)), indexing="ij")
    assert torch.equal(influence(build(composition="parallel"), tokens), (a == i) | (b == j))


def test_two_row_passes_serve_four_corners():
    """Each corner alone, its row pass its own, gives the same."""
    mixer, tokens = build(), grid(3, 5)
    x, gate = mixer.project_in(tokens)
    branches = mixer.corner_branches(x, gate)
    for number, (row, column) in enumerate([("right", "down"), ("right", "up"), ("left", "down"), ("left", "up")]):
        rows = mixer.run_pass(x, (row,), ("",), "B") * gate
        same(mixer.run_pass(rows, (column,), ("_2",), "C")[:, 0], branches[:, number])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (3, 8)])
@pytest.mark.parametrize(
    "options", [{}, {"corners": 1}, {"corners": 2}, {"composition": "parallel"}, {"norm_between": True}, {"window": 2}]
)
def test_any_grid_has_an_output_of_its_shape_and_gradients_to_every_parameter(size, options):
    mixer, tokens = build(**options), grid(*size)
    y = mixer(tokens)
    y.square().sum().backward()
    assert y.shape == tokens.shape and y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_windows_are_planes_of_their_own_and_come_back_to_their_place():
    tokens = grid(5, 7)
    same(from_windows(to_windows(tokens, 3), 3, (5, 7)), tokens)
    assert to_windows(tokens, 3).shape == (2 * 2 * 3, 3, 3, E)
    seen = influence(build(window=3), tokens)
    i, j, a, b = torch.meshgrid(*(torch.arange(n) for n in (5, 7, 5, 7)), indexing="ij")
    assert torch.equal(seen, (i // 3 == a // 3) & (j // 3 == b // 3))


def test_windows_may_differ_from_layer_to_layer():
    assert [V2MMixer(E, layer, window=[0, 2]).window for layer in (0, 1)] == [0, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corners": 3}, "corners 3 is unknown"),
        ({"composition": "woven"}, "composition 'woven' is unknown"),
        ({"window": -1}, "window -1 is no number of tokens"),
        ({"window": [2], "layer": 1}, "one for each layer"),
    ],
)
def test_unknown_choices_are_refused_in_one_sentence(options, words):
    with pytest.raises(UserError, match=words):
        V2MMixer(E, **options)


def test_the_released_mixer_refuses_grids_that_are_not_square():
    with pytest.raises(UserError, match="square grids only, got 3 x 5"):
        build(ReleasedMixer)(grid(3, 5))


def test_the_kernels_are_given_the_whole_grid_at_once(monkeypatch):
    """Two row passes and four column passes are two calls; nothing is scanned a corner at a time."""
    calls = []

    def spy(u, *arguments, directions, **options):
        calls.append((tuple(u.shape), tuple(directions)))
        return scan2d(u, *arguments, directions=directions, **options)

    monkeypatch.setattr("v2m.passes.scan2d", spy)
    build()(grid(3, 5))
    assert calls == [((2, 2, 2 * E, 3, 5), ("right", "left")), ((2, 4, 2 * E, 3, 5), ("down", "up", "down", "up"))]


def test_the_general_recurrence_begins_at_a_row_pass_whose_results_the_columns_take_one_token_below():
    mixer, tokens = build(RoesserMixer), grid(3, 4)
    x = mixer.project_in(tokens)[0][:, 0]
    u = mixer._convolved(x[:, None], [mixer.conv1d], ("right",))
    u = mixer._convolved(u, [mixer.conv1d_2], ("down",))
    first, second = mixer.x_proj(u), mixer.x_proj_2(u)

    def scanned(source, selected, suffix, direction, name):
        delta = F.linear(selected[..., : mixer.rank], getattr(mixer, f"dt_proj{suffix}").weight)
        matrix = selected[..., mixer.rank :].permute(0, 1, 4, 2, 3)
        y = scan2d(
            source.permute(0, 1, 4, 2, 3),
            delta.permute(0, 1, 4, 2, 3),
            -getattr(mixer, f"A{suffix}_log").exp()[None],
            **{name: matrix},
            directions=(direction,),
            delta_bias=getattr(mixer, f"dt_proj{suffix}").bias[None],
            delta_softplus=True,
            backend="reference",
        )
        return y.permute(0, 1, 3, 4, 2)

    rows = scanned(u, first, "", "right", "B")
    above = torch.cat([torch.zeros_like(rows[:, :, :1]), rows[:, :, :-1]], 2)
    expected = rows + scanned(u + above, second, "_2", "down", "C") + mixer.D * u
    same(mixer.recurrence(x), expected[:, 0])


@pytest.mark.parametrize("corners", [1, 2, 4])
def test_the_general_recurrence_takes_any_grid_and_gives_gradients_to_every_parameter(corners):
    for size in ((1, 1), (1, 5), (4, 1), (3, 5)):
        mixer, tokens = build(RoesserMixer, corners=corners), grid(*size)
        y = mixer(tokens)
        y.square().sum().backward()
        assert y.shape == tokens.shape and y.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    tokens = grid(3, 4)
    if corners == 4:
        same(mixer(tokens.flip(1)), mixer(tokens).flip(1))
    assert influence(mixer, tokens).all() == (corners == 4)
