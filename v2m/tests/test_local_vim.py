"""LocalVim: its layer by its definition, orders and windows, the rotated stream; V2M's mixer in its place."""

import functools

import pytest
import torch
from torch.nn import functional as F

from shared.claims.compose import row_config
from shared.errors import UserError
from v2m.local_vim import LocalVim, LocalVimMixer, V2MLocalMixer, from_sequence, rotate, rotation, to_sequence
from v2m.mixer import V2MMixer
from v2m.model import build_model
from v2m.tests.golden_files import relative_error
from v2m.vim import Vim

# float64 sums of a few dozen terms in another order
EXACT = 1e-10
# Published: 8 M and 28 M (README of hunto/LocalMamba); exactly, the names and shapes of its code.
PARAMETERS = {192: 7_994_152, 384: 27_783_784}
FOUR = [["h", "v_flip", "w2", "w2_flip"]]
E = 16


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build(cls=LocalVimMixer, **options):
    torch.manual_seed(0)
    options = {"state_dim": 4, "backend": "chunked"} | options
    mixer = cls(E, **({"directions": FOUR} if cls is LocalVimMixer else {"window": 0}) | options).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.startswith("dt_proj") and name.endswith("bias"):
                parameter.fill_(0.5)  # steps of about one: what lies far away is seen, and fades
            if name.startswith("attn"):
                parameter.normal_()  # an attention that differs between channels and directions
    return mixer


def small(cls=LocalVim, depth: int = 2, **changes):
    torch.manual_seed(0)

    def mixer(embed_dim, layer, backend):
        return LocalVimMixer(embed_dim, layer, directions=FOUR * depth, state_dim=4, backend=backend)

    arguments = {"image_size": 32, "patch_size": 8, "embed_dim": E, "depth": depth, "num_classes": 5}
    return cls(**{**arguments, "mixer": mixer, "backend": "chunked"} | changes).double().eval()


def order_of(direction: str, height: int, width: int) -> list[tuple[int, int]]:
    """The places that a direction visits, by what its name says, those that fill windows included."""
    path, _, flip = direction.partition("_")
    side = int(path[1:]) if path[1:] else 1
    rows, columns = (-(-n // side) * side for n in (height, width))
    places = [(i, j) for i in range(rows) for j in range(columns)]
    keys = {
        "h": lambda p: p,
        "v": lambda p: p[::-1],
        "w": lambda p: (p[0] // side, p[1] // side, p[0] % side, p[1] % side),
    }
    return sorted(places, key=keys[path[0]], reverse=bool(flip))


def by_definition(mixer: LocalVimMixer, grid: torch.Tensor, directions: list[str]) -> torch.Tensor:
    """One layer as its authors compute it: reorder, convolve, scan token by token, gate, put back, attend, add."""
    batch, height, width, _ = grid.shape
    x, z = (grid @ mixer.in_proj.weight.T).chunk(2, -1)
    total = 0
    for k, direction in enumerate(directions):
        order = order_of(direction, height, width)
        inside = [place[0] < height and place[1] < width for place in order]
        rows, columns = zip(*order, strict=True)
        padded = F.pad(x, (0, 0, 0, max(columns) + 1 - width, 0, max(rows) + 1 - height))
        u = padded[:, rows, columns]  # (B, L, D)
        conv = getattr(mixer, f"conv1d_{k}")
        u = F.conv1d(u.mT, conv.weight, conv.bias, padding=3, groups=u.shape[-1])[..., : len(order)]
        u = F.silu(u).mT
        ranks, B, C = getattr(mixer, f"x_proj_{k}")(u).split((mixer.rank, 4, 4), -1)
        delta = F.softplus(getattr(mixer, f"dt_proj_{k}")(ranks))
        A, state, y = (-getattr(mixer, f"A_{k}_log").exp(), 0, grid.new_zeros(batch, height, width, x.shape[-1]))
        for t, place in enumerate(order):
            state = torch.exp(delta[:, t, :, None] * A) * state
            state = state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            if inside[t]:
                out = (state * C[:, t, None]).sum(-1) + getattr(mixer, f"D_{k}") * u[:, t]
                y[:, place[0], place[1]] = out * F.silu(z[:, place[0], place[1]])
        attn = mixer.attn
        mean = F.layer_norm(y, y.shape[-1:], attn.norm.weight, attn.norm.bias).mean((1, 2), keepdim=True)
        total = total + y * torch.sigmoid(attn.channel_select(F.gelu(attn.global_reduce(mean))))
    return total @ mixer.out_proj.weight.T


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 4)])
@pytest.mark.parametrize("directions", [FOUR[0], ["h_flip", "v", "w3", "w2"]])
@torch.no_grad()
def test_a_layer_is_what_its_definition_says(size, directions):
    mixer, grid = build(directions=[directions]), noise(2, *size, E)
    assert relative_error(mixer(grid), by_definition(mixer, grid, directions)) < EXACT


@pytest.mark.parametrize("path", ["h", "v", "w2", "w3"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_a_sequence_visits_the_tokens_in_its_order_and_comes_back(path, size):
    grid = torch.arange(1.0, size[0] * size[1] + 1).view(1, *size, 1)
    order = order_of(path, *size)
    expected = [grid[0, i, j, 0] if i < size[0] and j < size[1] else 0 for i, j in order]
    sequence = to_sequence(grid, path)
    assert torch.equal(sequence[0, :, 0], torch.tensor(expected))
    assert torch.equal(from_sequence(sequence, path, size), grid)


@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_backends_agree_on_output_and_gradients(backend):
    results = []
    for name in ("reference", backend):
        mixer, grid = build(backend=name), noise(1, 3, 2, E).requires_grad_()
        y = mixer(grid)
        (y * noise(*y.shape)).sum().backward()
        results.append([y.detach(), grid.grad, *(p.grad for p in mixer.parameters())])
    assert all(relative_error(got, expected) < EXACT for expected, got in zip(*results, strict=True))


@pytest.mark.parametrize("cls", [LocalVimMixer, V2MLocalMixer])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (3, 8)])
def test_any_grid_has_an_output_of_its_shape_and_gradients_to_every_parameter(cls, size):
    mixer, grid = build(cls), noise(2, *size, E)
    y = mixer(grid)
    y.square().sum().backward()
    assert y.shape == grid.shape and y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_rotation_turns_pairs_by_row_and_column_and_keeps_their_length():
    grid, size = noise(2, 14, 14, E), (14, 14)
    turned = rotate(grid, *rotation(size, E, grid))
    frequencies = 10_000.0 ** (-torch.arange(0, E // 2, 2, dtype=torch.float64) / (E // 2))
    pairs, got = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (grid, turned))
    for i, j in [(0, 0), (3, 0), (0, 5), (13, 2)]:
        angles = torch.cat([i * frequencies, j * frequencies])
        torch.testing.assert_close(got[:, i, j], pairs[:, i, j] * torch.exp(1j * angles), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.abs(), pairs.abs())


def test_positions_of_the_rotation_are_spread_over_grids_of_any_size():
    like = noise(1)
    coarse, fine = rotation((7, 2), E, like), rotation((14, 28), E, like)
    # Row 3 of 7 lies where row 6 of 14 does, column 1 of 2 where column 14 of 28 does.
    for a, b in zip(coarse, fine, strict=True):
        torch.testing.assert_close(a[3, 1], b[6, 14])


def test_the_whole_stream_is_rotated_before_every_layer():
    network = small(depth=3)
    with torch.no_grad():
        for layer in network.layers:
            layer.mixer.out_proj.weight.zero_()  # the residual path alone is left
    images = noise(1, 3, 32, 32)
    start = network.patch_embed(images) + network.pos_embed.unflatten(1, (4, 4))
    for _ in range(3):
        start = rotate(start, *rotation((4, 4), E, start))
    expected = network.norm_f(start).detach().permute(0, 3, 1, 2)
    assert relative_error(network.forward_features(images), expected) < EXACT
    plain = small(Vim, depth=3)
    plain.load_state_dict(network.state_dict())
    assert relative_error(plain.forward_features(images), expected) > 0.1


@pytest.mark.parametrize("height, width", [(32, 32), (40, 24), (8, 64)])
def test_features_come_at_any_size_that_patches_tile_and_the_head_reads_their_mean(height, width):
    network, images = small(), noise(2, 3, height, width)
    features = network.forward_features(images)
    assert features.shape == (2, E, height // 8, width // 8)
    assert relative_error(network(images), network.head(features.mean((2, 3))).detach()) < EXACT


@pytest.mark.parametrize("size, width", [("t", 192), ("s", 384)])
def test_configured_networks_have_the_published_number_of_parameters(size, width):
    cfg = row_config("v2m", f"v2m-in1k-localvim-{size}", 0)
    with torch.device("meta"):
        network = build_model(cfg)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[width]
    scans = [len(layer.mixer.paths) for layer in network.layers]
    assert len(scans) == 20 and all(sum(map(len, layer.mixer.paths.values())) == 4 for layer in network.layers)


@pytest.mark.parametrize("mixer", [LocalVimMixer, V2MLocalMixer])
def test_autocast_in_bfloat16_stays_close(mixer):
    network = small(mixer=lambda width, layer, backend: build(mixer, backend=backend)).float()
    images = noise(2, 3, 32, 32).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    # bfloat16 has 8 bits of mantissa and the logits pass two blocks
    with torch.no_grad():
        assert relative_error(logits, network(images).double()) < 5e-2


def test_scan_parameters_biases_and_positions_are_not_decayed():
    for network in (small(), small(mixer=lambda width, layer, backend: build(V2MLocalMixer))):
        decayed = {name for name, _ in network.named_parameters()} - network.no_weight_decay()
        assert all(name.endswith(".weight") for name in decayed)


def test_equal_corners_and_an_attention_of_one_half_give_the_mixer_of_v2m():
    """It halves the sum of its corners."""
    local, plain, grid = build(V2MLocalMixer, window=2), build(V2MMixer, window=2), noise(2, 3, 5, E)
    state = dict(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        for suffix in ("_2_1", "_2_2", "_2_3"):
            head, second, tail = name.partition("_2")
            if second:
                state[head + suffix + tail] = tensor
    missing, unexpected = local.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("attn") for name in missing)
    with torch.no_grad():
        local.attn.channel_select.weight.zero_()
        local.attn.channel_select.bias.zero_()
    assert relative_error(local(grid), plain(grid).detach()) < EXACT


def test_corners_of_the_local_mixer_have_parameters_of_their_own():
    mixer, grid = build(V2MLocalMixer), noise(2, 3, 5, E)
    before = mixer.corner_branches(*mixer.project_in(grid))
    with torch.no_grad():
        mixer.D_2_2.add_(1)
    after = mixer.corner_branches(*mixer.project_in(grid))
    changed = [not torch.equal(before[:, k], after[:, k]) for k in range(4)]
    assert changed == [False, False, True, False]


def test_windows_of_the_local_mixer_touch_each_other_through_the_attention_alone():
    mixer, grid = build(V2MLocalMixer, window=3), noise(1, 6, 3, E)
    with torch.no_grad():
        mixer.attn.global_reduce.weight.zero_()
    other = grid.clone()
    other[:, 3:] += 1
    assert torch.equal(mixer(grid)[:, :3], mixer(other)[:, :3])
    assert not torch.equal(build(V2MLocalMixer)(grid)[:, :3], build(V2MLocalMixer)(other)[:, :3])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: build(directions=[["h", "x"]]), "direction 'x' is unknown"),
        (lambda: build(directions=[["w0"]]), "direction 'w0' is unknown"),
        (lambda: build(layer=1), "one for each layer"),
        (lambda: build(V2MLocalMixer, window=[2], layer=1), "one for each layer"),
        (lambda: small(class_token="middle"), "choose class_token mean"),
        (lambda: small(embed_dim=18), "multiple of 4"),
        (lambda: small()(noise(1, 3, 30, 32)), "do not tile"),
    ],
)
def test_what_cannot_be_built_or_read_is_refused_with_the_remedy(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_the_official_start_draws_the_projections_anew_and_forgets_at_once():
    """Standard deviations of github.com/hunto/LocalMamba's network: 0.020, and 0.021 of the patch convolution."""

    def start(initialisation):
        torch.manual_seed(0)
        mixer = functools.partial(LocalVimMixer, directions=FOUR)
        sizes = {"image_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 1, "num_classes": 10}
        return LocalVim(**sizes, mixer=mixer, initialisation=initialisation).state_dict()

    plain, official = start("mamba"), start("local_vim")
    drawn = [
        f"layers.0.mixer.{name}"
        for name in ("in_proj", *(f"{part}_{i}" for part in ("x_proj", "dt_proj") for i in range(4)))
    ]
    for name in drawn:
        assert official[f"{name}.weight"].std() == pytest.approx(0.020, rel=0.03)
        assert plain[f"{name}.weight"].std() > 0.025
    assert official["patch_embed.proj.weight"].std() == pytest.approx(0.021, rel=0.03)
    assert official["patch_embed.proj.bias"].any() and not plain["patch_embed.proj.bias"].any()
    biases = [f"layers.0.mixer.dt_proj_{i}.bias" for i in range(4)]
    assert not any(official[name].any() for name in biases) and all(plain[name].all() for name in biases)
    changed = {f"{name}.weight" for name in drawn} | {*biases, "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {name for name in plain if not torch.equal(plain[name], official[name])} == changed
    with pytest.raises(UserError, match="initialisation 'vim' is unknown: choose one of mamba, local_vim"):
        small(initialisation="vim")
