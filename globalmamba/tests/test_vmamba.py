"""VMamba: the golden network, the official names, four directions, features at any size, errors."""

import json
import math

import pytest
import torch
from timm.models._features import FeatureGetterNet

from globalmamba.layout import Layout
from globalmamba.tests.golden_files import FOLDER, golden, relative_error
from globalmamba.vmamba import SIZES, SS2D, VMamba, from_official
from shared.errors import UserError

# float64 against float64: only the order of sums differs
GOLDEN_ERROR = 1e-9
EXACT = 1e-12
# float32 against float64 through four blocks
SINGLE = 1e-4
MANIFEST = json.loads((FOLDER / "vmamba_manifest.json").read_text(encoding="utf-8"))
PARAMETERS = {"tiny": 30_249_064, "small": 50_147_752, "base": 88_557_800}


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
    shapes = MANIFEST[official]
    with torch.device("meta"):
        checkpoint = {"model": {name: torch.empty(shape) for name, shape in shapes.items()}}
        network = VMamba(num_classes=1000, **SIZES[size])
    network.load_state_dict(from_official(checkpoint), assign=True)
    assert {name: list(tensor.shape) for name, tensor in network.named_parameters()} == shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[size]


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


def test_the_four_directions_are_rows_and_columns_and_both_backwards():
    torch.manual_seed(0)
    mixer = SS2D(8, 1.0, 2, "reference").double()
    height, width = 3, 4
    x = noise(1, height * width, 8)
    layout, seen = Layout(((height, width),)), []
    for direction in range(4):
        # The step's input projection B of one direction alone is left, so only its scan carries anything.
        only = SS2D(8, 1.0, 2, "reference").double()
        only.load_state_dict(mixer.state_dict())
        with torch.no_grad():
            only.Ds.zero_()
            for other in set(range(4)) - {direction}:
                only.x_proj_weight[other].zero_()
        reach = torch.autograd.functional.jacobian(lambda t, m=only: m.scan(t, layout)[0].sum(-1), x)
        seen.append(reach[:, 0].abs().sum(-1) > 0)  # (L out, L in)
    place = torch.arange(height * width)
    by_column = place % width * height + place // width
    rows, columns = place[:, None] >= place, by_column[:, None] >= by_column
    for got, expected in zip(seen, (rows, columns, rows.T, columns.T), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("state_dim", [1, 3])
def test_every_parameter_gets_gradient(features_only, state_dim):
    network = small(features_only=features_only, state_dim=state_dim, ssm_ratio=2.0, drop_path=0.1)
    # The last grid has more than one token: with one, A multiplies a state of 0.
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


def test_autocast_in_bfloat16_stays_close():
    network, images = small().float(), noise(1, 3, 32, 32).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    # bfloat16 has 8 bits of mantissa and the logits pass four blocks
    with torch.no_grad():
        assert relative_error(logits, network(images).double()) < 5e-2


def test_biases_norms_and_the_scan_s_own_parameters_are_not_decayed():
    network = small()
    free = network.no_weight_decay()
    decayed = {name.rsplit(".", 1)[-1] for name, _ in network.named_parameters() if name not in free}
    assert decayed == {"weight", "x_proj_weight", "dt_projs_weight"}
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
