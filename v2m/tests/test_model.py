"""The networks of the configs: counts against the papers and by hand, reloading, what cannot be built."""

import pytest
import torch

from shared.claims.compose import compose, row_config
from shared.claims.ledger import load_ledger
from shared.environment import repository_root
from shared.errors import UserError
from v2m.model import build_model, count, count_network
from v2m.passes import ScanMixer
from v2m.vmamba_scan import GridMixer

# As printed: parameters in millions, FLOPs in billions where the rule of model.py gives them.
PRINTED = {
    "v2m-in1k-vim-t": (7, None),
    "v2m-in1k-vim-s": (26, None),
    "v2m-in1k-localvim-t": (8, None),
    "v2m-in1k-localvim-s": (28, None),
    "v2m-in1k-vmamba-t": (30, 4.9),
    "v2m-in1k-vmamba-s": (50, 8.7),
    "v2m-in1k-t": (7, None),
    "v2m-in1k-s": (26, None),
    "v2m-in1k-t-lw": (8, None),
    "v2m-in1k-s-lw": (28, None),
    "v2m-in1k-sstar": (30, None),
    "v2m-in1k-bstar": (50, None),
}
ROUND = {"parameters": 1e6, "flops": 1e8}  # one unit of the last printed digit
BUDGET = 0.02  # of the baseline's parameters
SAME = {"rtol": 0, "atol": 0}  # moving and reloading changes no bit


def counted(row: str) -> dict[str, int]:
    return count(row_config("v2m", row, 0))


@pytest.mark.parametrize("row", PRINTED)
def test_network_has_the_printed_parameters_and_flops(row):
    parameters, flops = PRINTED[row]
    counts = counted(row)
    assert abs(counts["parameters"] - parameters * 1e6) <= ROUND["parameters"]
    if flops is not None:
        assert abs(counts["flops"] - flops * 1e9) <= ROUND["flops"]


def test_each_call_counted_once_gives_vim_t_its_printed_flops():
    assert counted("v2m-in1k-vim-t")["flops_scan_once"] == pytest.approx(1.5e9, abs=ROUND["flops"])


@pytest.mark.parametrize("row, printed", [("v2m-in1k-vim-s", 5.1), ("v2m-in1k-t", 1.9), ("v2m-in1k-s", 5.9)])
def test_printed_flops_lie_between_no_scan_and_each_call_once_where_no_rule_gives_them(row, printed):
    counts = counted(row)
    assert all(abs(counts[key] - printed * 1e9) > ROUND["flops"] for key in counts if key != "parameters")
    assert counts["flops_without_scan"] < printed * 1e9 < counts["flops_scan_once"] < counts["flops"]


# One block of 16 channels on 4 x 4 tokens: what the counts below are worked out for.
WIDTH, INNER, STATE, KERNEL, RANK, TOKENS, CLASSES = 16, 32, 2, 4, 1, 16, 10
SMALL = ["model.network.depth=1", f"model.network.embed_dim={WIDTH}", "model.network.patch_size=2"]
SMALL += [f"model.network.mixer.state_dim={STATE}", "data.image_size=8", "trainer.backend=chunked"]
SCAN = 9 * TOKENS * INNER * STATE  # in one direction
AROUND = TOKENS * 3 * 2 * 2 * WIDTH + WIDTH * CLASSES  # patches and head


def small(model: str, *overrides: str) -> dict[str, int]:
    return count_network(build_model(compose("v2m", [f"model={model}", *SMALL, *overrides])), 8, 3)


def linear_and_convolution(directions: int, tokens: int, chosen: int) -> int:
    """Return the multiply-adds of passes in front of their scans; ``chosen`` of B and C are the token's choice."""
    maps = INNER * (RANK + chosen * STATE) + RANK * INNER
    return directions * tokens * (KERNEL * INNER + maps)


def projections(tokens: int) -> int:
    return tokens * (WIDTH * 2 * INNER + INNER * WIDTH)


def test_counts_of_v2m_by_hand():
    # Two row passes and four column passes, one projection in and one out.
    counts = small("v2m-lite")
    without = AROUND + projections(TOKENS) + linear_and_convolution(2 + 4, TOKENS, 1)
    assert counts["flops_without_scan"] == without
    assert counts["flops"] == without + (2 + 4) * SCAN
    assert counts["flops_scan_once"] == without + 2 * SCAN


@pytest.mark.parametrize(
    "overrides, directions",
    [
        (["model.network.mixer.corners=1"], 1 + 1),
        (["model.network.mixer.corners=2"], 2 + 2),
        (["model.network.mixer.composition=parallel"], 2 + 2),
    ],
)
def test_fewer_corners_and_parallel_scans_count_the_passes_that_they_run(overrides, directions):
    counts = small("v2m-lite", *overrides)
    without = AROUND + projections(TOKENS) + linear_and_convolution(directions, TOKENS, 1)
    assert (counts["flops_without_scan"], counts["flops"]) == (without, without + directions * SCAN)


def test_counts_of_vim_by_hand():
    # Both directions over the sequence, which the class token makes longer by one.
    counts, tokens = small("vim-digits"), TOKENS + 1
    without = AROUND + projections(tokens) + linear_and_convolution(2, tokens, 2)
    scan = 9 * tokens * INNER * STATE
    assert counts["flops_without_scan"] == without
    assert (counts["flops"], counts["flops_scan_once"]) == (without + 2 * scan, without + scan)


def test_counts_of_the_general_recurrence_by_hand():
    # Four corners, each with both convolutions and selections and one recurrence: two scans, and two couplings of an
    # inner product and an update.
    counts = small("v2m-roesser-lite")
    without = AROUND + projections(TOKENS) + linear_and_convolution(4 + 4, TOKENS, 1)
    recurrence = 4 * (2 * 9 + 2 * 2) * TOKENS * INNER * STATE
    assert counts["flops_without_scan"] == without
    assert counts["flops"] == counts["flops_scan_once"] == without + recurrence


def test_counts_of_the_release_by_hand():
    # Four copies of the tokens, each projected in and scanned once along rows and once along columns.
    counts = small("v2m-released-lite")
    into = 4 * TOKENS * WIDTH * 2 * INNER
    without = AROUND + into + TOKENS * INNER * WIDTH + linear_and_convolution(4 + 4, TOKENS, 1)
    assert (counts["flops_without_scan"], counts["flops"]) == (without, without + 8 * SCAN)


OWN = load_ledger(repository_root(), "v2m")


@pytest.mark.parametrize("row, baseline", [(row.Row, other) for row in OWN.Demo for other in row.Baseline])
def test_row_of_the_demo_has_the_parameters_of_its_baseline_within_two_percent(row, baseline):
    ours, theirs = (counted(name)["parameters"] for name in (row, baseline))
    assert abs(ours - theirs) <= BUDGET * theirs


# The side of the images; a pyramid is narrowed, so that it is quick.
NARROW = ["model.network.dims=8", "model.network.depths=[1,1,1,1]"]
SIZES = {
    "vim-digits": (8, []),
    "v2m-lite": (8, []),
    "v2m-released-lite": (8, []),
    "v2m-roesser-lite": (8, ["model.network.depth=2"]),
    "v2m-t-lw": (32, ["model.network.depth=2", "model.network.embed_dim=16"]),
    "local-vim-t": (32, ["model.network.depth=2", "model.network.embed_dim=16"]),
    "vmamba-t": (64, NARROW),
    "v2m-sstar": (64, NARROW),
}


def of_size(model: str):
    size, overrides = SIZES[model]
    overrides = [f"model={model}", f"data.image_size={size}", "trainer.backend=chunked", *overrides]
    return compose("v2m", overrides), size


@pytest.mark.parametrize("model", SIZES)
@torch.no_grad()
def test_moving_a_model_and_reloading_its_state_gives_identical_output(model):
    cfg, size = of_size(model)
    torch.manual_seed(0)
    network, images = build_model(cfg).eval(), torch.randn(2, 3, size, size)
    expected = network(images)
    moved = network.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(moved(images), expected, **SAME)
    other = build_model(cfg).eval()
    assert not torch.equal(other(images), expected)
    other.load_state_dict(moved.state_dict())
    torch.testing.assert_close(other(images), expected, **SAME)


@pytest.mark.parametrize("model", SIZES)
def test_the_backend_of_the_config_reaches_every_mixer(model):
    network = build_model(of_size(model)[0])
    mixers = [part for part in network.modules() if isinstance(part, ScanMixer | GridMixer)]
    assert mixers and {mixer.backend for mixer in mixers} == {"chunked"}


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.network.patch_size=16"], "patches of 16 do not tile an image of 8 x 8"),
        (["model.network.depth=deep"], "model .* is configured wrongly"),
        (["+model.network.widht=3"], "model .* is configured wrongly .*widht"),
        (["+model.network.mixer.widht=3"], "model .* is configured wrongly .*widht"),
        (["model.network.mixer.window=[2]"], "window has 1 entries, layer 1 needs one"),
        (["model=v2m-roesser-lite", "model.network.mixer.corners=3"], "corners 3 is unknown"),
        (["model=local-vim-t", "model.network.class_token=middle"], "LocalVim has no class token"),
        (["model=local-vim-t", "model.network.mixer.directions=[[z]]"], "direction 'z' is unknown"),
        (["model=v2m-sstar", "model.network.scan_options.sets=3"], "sets 3 is unknown"),
        (["model=v2m-sstar", "model.network.scan=woven"], "scan 'woven' is unknown"),
    ],
)
def test_sizes_and_choices_that_cannot_be_built_are_one_sentence(overrides, words):
    # The size first: a network of 16-pixel patches needs images that they tile.
    size = 32 if any(override.startswith("model=local-vim") for override in overrides) else 8
    cfg = compose("v2m", ["model=v2m-lite", f"data.image_size={size}", *overrides])
    with pytest.raises(UserError, match=words) as error:
        build_model(cfg)
    assert "\n" not in str(error.value)
