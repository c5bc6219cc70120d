"""VMamba and V2M on VMamba: the golden network, the official names, corners, features at any size, errors."""

import json
import math

import pytest
import torch
from timm.models._features import FeatureGetterNet

from shared.errors import UserError
from v2m.tests.golden_files import FOLDER, golden, relative_error
from v2m.vmamba import VMamba, from_official
from v2m.vmamba_scan import CornerScan, CrossScan

# float64 against float64: only the order of sums differs
GOLDEN_ERROR = 1e-9
EXACT = 1e-12
# float32 against float64 through four blocks
SINGLE = 1e-4
MANIFEST = json.loads((FOLDER / "vmamba_manifest.json").read_text(encoding="utf-8"))
# vmamba_tiny_s1l8, vmamba_small_s2l15, vmamba_base_s2l15: the sizes and their published parameters
SIZES = {
    "tiny": ({"depths": (2, 2, 8, 2), "dims": 96, "ssm_ratio": 1.0}, 30_249_064),
    "small": ({"depths": (2, 2, 15, 2), "dims": 96, "ssm_ratio": 2.0}, 50_147_752),
    "base": ({"depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0}, 88_557_800),
}
CORNERS = ("top left", "bottom left", "top right", "bottom right")
READING = {"sets": 2, "conv_between": 4, "norm_between": False}


def small(**changes) -> VMamba:
    torch.manual_seed(0)
    arguments = {"num_classes": 5, "depths": (1, 1, 1, 1), "dims": 16, "ssm_ratio": 1.0, "backend": "chunked"}
    return VMamba(**{**arguments, **changes}).double()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dtype, error", [(torch.float64, GOLDEN_ERROR), (torch.float32, SINGLE)])
def test_the_golden_network_gives_the_golden_logits(dtype, error):
    network = small().to(dtype)
    network.load_state_dict(from_official(golden("vmamba_tiny_like", "param_")))
    with torch.no_grad():
        logits = network(golden("vmamba_tiny_like", "in_")["x"].to(dtype))
    assert relative_error(logits, golden("vmamba_tiny_like", "out_")["logits"]) < error


@pytest.mark.parametrize("size, official", list(zip(SIZES, MANIFEST, strict=True)))
def test_an_official_checkpoint_loads_whole(size, official):
    shapes, (arguments, parameters) = MANIFEST[official], SIZES[size]
    with torch.device("meta"):
        checkpoint = {"model": {name: torch.empty(shape) for name, shape in shapes.items()}}
        network = VMamba(num_classes=1000, **arguments)
    network.load_state_dict(from_official(checkpoint), assign=True)
    assert {name: list(tensor.shape) for name, tensor in network.named_parameters()} == shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def without(name: str):
    def change(state):
        del state[name]

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("classifier.head.weight"),
        without("layers.2.blocks.0.op.Ds"),
        lambda state: state.update(pos_embed=torch.zeros(1)),
        lambda state: state.update({"layers.3.blocks.0.op.out_proj.weight": torch.zeros(2, 2)}),
        lambda state: state.clear(),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(change):
    state = small().state_dict()
    change(state)
    with pytest.raises(UserError, match="not a VMamba.*give an official"):
        from_official(state)


def influence(function, grid: torch.Tensor) -> torch.Tensor:
    """Return which token (last two axes) has influence on which output (first two), a bool tensor (H, W, H, W)."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x[None])[0].sum(-1), grid[0])
    return jacobian.abs().sum(-1) > 0


def test_the_four_directions_are_rows_and_columns_and_both_backwards():
    torch.manual_seed(0)
    height, width = 3, 4
    grid, seen = noise(1, height, width, 8), []
    for direction in range(4):
        # B of one direction alone is left, so only its scan carries anything.
        only = CrossScan(8, 1.0, 2, "reference").double()
        with torch.no_grad():
            only.Ds.zero_()
            for other in set(range(4)) - {direction}:
                only.x_proj_weight[other].zero_()
        seen.append(influence(only.scan, grid).view(12, 12))  # (L out, L in)
    place = torch.arange(height * width)
    by_column = place % width * height + place // width
    rows, columns = place[:, None] >= place, by_column[:, None] >= by_column
    for got, expected in zip(seen, (rows, columns, rows.T, columns.T), strict=True):
        assert torch.equal(got, expected)


def corners(sets: int = 2, conv_between: int = 0, norm_between: bool = False, state_dim: int = 2) -> CornerScan:
    torch.manual_seed(0)
    options = {"sets": sets, "conv_between": conv_between, "norm_between": norm_between}
    mixer = CornerScan(8, 1.0, state_dim, "reference", **options).double()
    with torch.no_grad():
        for bias in (mixer.dt_projs_bias, mixer.dt_projs_bias_2):
            bias.fill_(0.5)  # steps of about one: what lies far away is seen, and fades
    return mixer


@pytest.mark.parametrize("options", [{}, {"sets": 1}, {"sets": 4}, {"conv_between": 4}, {"norm_between": True}])
@pytest.mark.parametrize("number", range(4))
def test_a_corner_sees_the_rectangle_between_it_and_the_token_and_nothing_else(number, options):
    mixer, (height, width) = corners(**options), (3, 4)
    seen = influence(lambda x: mixer.corner_branches(x)[:, number], noise(1, height, width, 8))
    i, j, a, b = torch.meshgrid(*(torch.arange(n) for n in (height, width, height, width)), indexing="ij")
    above = a <= i if CORNERS[number].startswith("top") else a >= i
    beside = b <= j if CORNERS[number].endswith("left") else b >= j
    assert torch.equal(seen, above & beside)


@pytest.mark.parametrize("state_dim", [1, 3])
def test_a_corner_is_a_row_pass_then_a_column_pass_by_their_definition(state_dim):
    """The top left corner, its row scan of every token written out, its column scan after it."""
    mixer, x = corners(4, state_dim=state_dim), noise(2, 3, 4, 8)

    def scanned(u, suffix, axis, constant):
        project, steps, bias, A, D = (part[0] for part in mixer.scan_parameters(suffix))
        ranks, chosen = (u @ project.T).split((mixer.rank, state_dim), -1)
        delta = torch.nn.functional.softplus(ranks @ steps.T + bias)
        state, outputs = 0, []
        for t in range(u.shape[axis]):
            here, step, own = (part.select(axis, t) for part in (u, delta, chosen))
            B, C = (1, own[..., None, :]) if constant == "B" else (own[..., None, :], 1)
            state = torch.exp(step[..., None] * A) * state + (step * here)[..., None] * B
            outputs.append((state * C).sum(-1) + D * here)
        return torch.stack(outputs, axis)

    expected = scanned(scanned(x, "", 2, "C"), "_2", 1, "B").detach()
    assert relative_error(mixer.corner_branches(x)[:, 0], expected) < EXACT


def test_mirroring_the_input_mirrors_the_output_where_all_corners_share_their_parameters():
    mixer, x = corners(1, conv_between=4), noise(2, 3, 5, 8)
    for axis in (1, 2):
        assert relative_error(mixer.scan(x.flip(axis)), mixer.scan(x).flip(axis).detach()) < EXACT
    assert relative_error(corners(4).scan(x.flip(1)), corners(4).scan(x).flip(1).detach()) > 1e-3


@pytest.mark.parametrize("conv_between", [0, 4])
@pytest.mark.parametrize("fewer, more", [(1, 2), (1, 4), (2, 4)])
def test_sets_that_hold_the_same_parameters_are_as_good_as_shared_ones(fewer, more, conv_between):
    shared, own = corners(fewer, conv_between), corners(more, conv_between)
    state = {}
    for name, tensor in shared.state_dict().items():
        times = len(own.state_dict()[name]) // len(tensor)
        repeated = tensor.repeat(times, *[1] * (tensor.dim() - 1))
        if (fewer, more) == (2, 4) and not name.endswith("_2") and not name.startswith("conv_between"):
            # Four row passes are right, right, left, left; two are right, left.
            repeated = tensor.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
        state[name] = repeated if times > 1 else tensor
    own.load_state_dict(state)
    x = noise(2, 3, 4, 8)
    assert relative_error(own.corner_branches(x), shared.corner_branches(x).detach()) < EXACT


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (4, 1)])
@pytest.mark.parametrize("scan, options", [("cross", {}), ("v2m", READING)])
def test_a_grid_of_one_row_or_column_has_an_output_of_its_shape(height, width, scan, options):
    network = small(patch_size=1, depths=(1,), dims=(8,), scan=scan, scan_options=options)
    features = network.forward_features(noise(2, 3, height, width))
    assert features.shape == (2, 8, height, width) and features.isfinite().all()


@pytest.mark.parametrize("scan, options", [("cross", {}), ("v2m", READING), ("v2m", {**READING, "sets": 4})])
def test_backends_agree_on_the_network(scan, options):
    images = noise(1, 3, 32, 48)
    expected = small(scan=scan, scan_options=options, backend="reference")(images).detach()
    assert relative_error(small(scan=scan, scan_options=options, backend="auto")(images), expected) < GOLDEN_ERROR


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
    "scan, options, state_dim",
    [
        ("cross", {}, 1),
        ("cross", {}, 3),
        ("v2m", READING, 1),
        ("v2m", {"sets": 4, "conv_between": 0, "norm_between": True}, 3),
    ],
)
def test_every_parameter_gets_gradient(features_only, scan, options, state_dim):
    chosen = {"scan": scan, "scan_options": options, "state_dim": state_dim}
    network = small(features_only=features_only, ssm_ratio=2.0, drop_path=0.1, **chosen)
    # The last grid has more than one row and column: with one, A multiplies a state of 0.
    outputs = network.eval()(noise(2, 3, 64, 33))
    weighted = sum((o * noise(*o.shape)).sum() for o in (outputs if features_only else [outputs]))
    weighted.backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("height, width", [(32, 32), (40, 56), (33, 47)])
def test_features_come_at_any_size(height, width):
    network = small(features_only=True, out_indices=(1, 3))
    outputs = network(noise(1, 3, height, width))

    def halved(size: int, times: int) -> int:
        for _ in range(times):
            size = (size + 1) // 2
        return size

    expected = [(1, 16 * 2**i, halved(height, i + 2), halved(width, i + 2)) for i in (1, 3)]
    assert [tuple(output.shape) for output in outputs] == expected


def test_features_are_those_of_the_classifier_and_timm_reads_them():
    images, network = noise(1, 3, 32, 40), small()
    final, stages = network.forward_intermediates(images)
    assert torch.equal(final, network.forward_features(images))
    assert torch.equal(network.forward_head(final), network(images))
    read = FeatureGetterNet(network, out_indices=(0, 2))
    assert [tuple(f.shape[1:]) for f in read(images)] == [(16, 8, 10), (64, 2, 3)]
    assert torch.equal(read(images)[1], stages[2])
    assert read.feature_info.channels() == [16, 64] and read.feature_info.reduction() == [4, 16]


@pytest.mark.parametrize("patch_size, side", [(1, 16), (2, 8), (4, 4)])
def test_the_stem_makes_one_token_of_each_patch(patch_size, side):
    network = small(patch_size=patch_size, depths=(1, 1), dims=(8, 12))
    assert network.stage_outputs(network.embed(noise(2, 3, 16, 16)))[0].shape == (2, 8, side, side)


def test_a_reloaded_network_gives_identical_outputs(tmp_path):
    network, images = small().float(), noise(1, 3, 32, 32).float()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    moved = small().to("meta").to_empty(device="cpu").to(torch.float32)
    moved.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(moved(images), network(images))
    there_and_back = network.double().float()
    assert torch.equal(there_and_back(images), moved(images))


@pytest.mark.parametrize("scan, options", [("cross", {}), ("v2m", READING), ("v2m", {**READING, "norm_between": True})])
def test_autocast_in_bfloat16_stays_close(scan, options):
    network, images = small(scan=scan, scan_options=options).float(), noise(1, 3, 32, 32).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    # bfloat16 has 8 bits of mantissa and the logits pass four blocks
    with torch.no_grad():
        assert relative_error(logits, network(images).double()) < 5e-2


def test_biases_norms_and_the_scan_s_own_parameters_are_not_decayed():
    network = small(scan="v2m", scan_options=READING)
    free = network.no_weight_decay()
    decayed = {name.rsplit(".", 1)[-1] for name, _ in network.named_parameters() if name not in free}
    projections = {f"{name}_weight{suffix}" for name in ("x_proj", "dt_projs") for suffix in ("", "_2")}
    assert decayed == {"weight", *projections}
    assert all(p.dim() > 1 for name, p in network.named_parameters() if name not in free)


def test_drop_path_grows_from_nothing_to_the_given_rate():
    network = small(depths=(1, 2, 1, 1), drop_path=0.4)
    rates = [block.drop_path.drop_prob for stage in network.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_a_network_without_classes_gives_pooled_features():
    network = small(num_classes=0)
    assert network(noise(2, 3, 32, 32)).shape == (2, 128)
    network.reset_classifier(7)
    assert network(noise(2, 3, 32, 32)).shape == (2, 7) and network.get_classifier().out_features == 7


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 3}, "use 1, 2 or 4"),
        ({"scan": "spiral"}, "choose one of cross, v2m"),
        ({"scan": "v2m", "scan_options": {**READING, "sets": 3}}, "choose one of 1, 2, 4"),
        ({"dims": (8, 16)}, "give one width"),
        ({"features_only": True, "out_indices": (4,)}, "use numbers from 0 to 3"),
        ({"features_only": True, "out_indices": ()}, "use numbers from 0 to 3"),
    ],
)
def test_a_size_that_cannot_be_built_is_refused_with_the_remedy(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(UserError, match="smaller than a patch of 4: use larger images"):
        small()(noise(1, 3, 3, 8))
