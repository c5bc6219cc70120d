"""The networks of the configs: counts against the papers, equal budgets, reloading, timm's names, bad sizes."""

import pytest
import timm
import torch

from globalmamba.data import training_data
from globalmamba.model import build_model, count, count_network
from globalmamba.tools import timm_models
from shared.claims.compose import compose, row_config
from shared.claims.ledger import load_ledger
from shared.dense.libraries import missing_modules
from shared.environment import repository_root
from shared.errors import UserError

# Of the baselines, as their papers print them: parameters in millions, FLOPs in billions where the rule gives them.
PRINTED = {
    "in1k-vim-t": (7, None),  # 1.5 only with the scan counted once
    "in1k-vim-s": (26, None),
    "in1k-vmamba-t": (30, 4.9),
    "in1k-vmamba-s": (50, 8.7),
    "in1k-vmamba-b": (89, None),  # 15.4; the rule gives 15.27, more than a unit of the last digit less
}
ROUND = {"parameters": 1e6, "flops": 1e8}  # one unit of the last printed digit
BUDGET = 0.02  # of the baseline's parameters
SAME = {"rtol": 0, "atol": 0}  # moving and reloading changes no bit


def counted(row: str) -> dict[str, int]:
    return count(row_config("globalmamba", row, 0))


@pytest.mark.parametrize("row", PRINTED)
def test_baseline_has_the_printed_parameters_and_flops(row):
    parameters, flops = PRINTED[row]
    counts = counted(row)
    assert abs(counts["parameters"] - parameters * 1e6) <= ROUND["parameters"]
    if flops is not None:
        assert abs(counts["flops"] - flops * 1e9) <= ROUND["flops"]


def test_the_scan_counted_once_gives_vim_t_its_printed_flops_and_vim_s_none_of_the_rules():
    # 1.5 G and 5.1 G are printed; the rule counts both directions, so it says more.
    tiny, small = (counted(f"in1k-vim-{size}") for size in "ts")
    assert tiny["flops_scan_once"] == pytest.approx(1.5e9, abs=ROUND["flops"])
    assert small["flops_without_scan"] < 5.1e9 < small["flops_scan_once"] < small["flops"]


VIM = ["model=vim-digits", "model.network.depth=1", "model.network.embed_dim=16", "model.network.state_dim=2"]
VIM += ["model.tokens.patch_size=2"]


def test_counting_rule_by_hand():
    network = build_model(compose("globalmamba", [*VIM, "model.network.mixer=causal"]))
    width, tokens, classes, rank = 16, 16, 10, 1
    inner, state, kernel, length = 2 * width, 2, 4, tokens + 1
    convolution = kernel * inner * length
    linear = length * (width * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * width)
    patches = tokens * width * 3 * 2 * 2
    scan = 9 * length * inner * state
    counts = count_network(network, 8, 3)
    assert counts["flops_without_scan"] == convolution + linear + patches + width * classes
    assert counts["flops"] == counts["flops_scan_once"] == counts["flops_without_scan"] + scan


def test_second_direction_is_counted_and_scan_once_leaves_it_out():
    counts = count_network(build_model(compose("globalmamba", VIM)), 8, 3)
    scan = counts["flops"] - counts["flops_without_scan"]
    assert scan == 2 * (counts["flops_scan_once"] - counts["flops_without_scan"]) > 0


OWN = load_ledger(repository_root(), "globalmamba")


def one_direction(row: str) -> bool:
    return "causal" in row or "released" in row


@pytest.mark.parametrize(
    "row, baseline", [(row.Row, other) for row in (*OWN.Lite, *OWN.Demo) for other in row.Baseline]
)
def test_row_has_the_parameters_of_its_baseline_within_two_percent(row, baseline):
    if row_config("globalmamba", row, 0).dense is not None and missing_modules():
        pytest.skip("the extra for segmentation is not here: make setup-dense")
    if one_direction(row) != one_direction(baseline):
        pytest.skip("a mixer of one direction has fewer parameters by design")
    ours, theirs = (counted(name)["parameters"] for name in (row, baseline))
    assert abs(ours - theirs) <= BUDGET * theirs


SIZES = {"vim-digits": 8, "globalmamba-lite": 32, "vmamba-lite": 32, "globalvmamba-lite": 32}


@pytest.mark.parametrize("model", SIZES)
@torch.no_grad()
def test_moving_a_model_and_reloading_its_state_gives_identical_output(model):
    size = SIZES[model]
    cfg = compose("globalmamba", [f"model={model}", f"data.image_size={size}", "trainer.backend=chunked"])
    torch.manual_seed(0)
    network, images = build_model(cfg).eval(), torch.randn(2, 3, size, size)
    expected = network(images)
    moved = network.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(moved(images), expected, **SAME)
    other = build_model(cfg).eval()
    assert not torch.equal(other(images), expected)
    other.load_state_dict(moved.state_dict())
    torch.testing.assert_close(other(images), expected, **SAME)


def test_every_row_of_timm_models_is_registered_or_timms_own():
    assert set(timm_models.ROWS) <= set(timm.list_models())
    assert {timm_models.ROWS[name] for name in timm.list_models("globalmamba_*")} == {
        f"gm-in1k-{size}" for size in ("m", "tstar", "t", "s", "b")
    }


@torch.no_grad()
def test_timm_takes_its_own_arguments():
    small = {"depth": 1, "embed_dim": 16, "backend": "chunked"}
    network = timm.create_model("globalmamba_m_vim", num_classes=7, img_size=128, in_chans=1, **small)
    assert network(torch.randn(2, 1, 128, 128)).shape == (2, 7)
    assert network.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


@torch.no_grad()
def test_timm_gives_the_stages_of_a_pyramid():
    small = {"depths": [1, 1, 1, 1], "dims": 8, "backend": "chunked"}
    features = timm.create_model("globalmamba_t", features_only=True, out_indices=(1, 3), **small)
    assert features.feature_info.channels() == [16, 64] and features.feature_info.reduction() == [8, 32]
    assert [f.shape for f in features(torch.randn(1, 3, 64, 64))] == [(1, 16, 8, 8), (1, 64, 2, 2)]


def test_timm_refuses_the_stages_of_a_plain_network():
    with pytest.raises(UserError, match="features_only is for the pyramids"):
        timm.create_model("globalmamba_m_vim", features_only=True)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.tokens.patch_size=16"], "smaller than a patch"),
        (["model.tokens.patch_size=3"], "no whole number of patches"),
        (["model.tokens.patch_size=1", "model.tokens.levels=5"], "levels leave the lowest one"),
        (["model.tokens.levels=9"], "choose from 2 to 6"),
        (["model.tokens.order=sideways"], "order is 'sideways'"),
        (["model.network.mixer=both"], "mixer 'both'"),
        (["model.network.depth=deep"], "model .* is configured wrongly"),
        (["+model.network.widht=3"], "model .* is configured wrongly .*widht"),
        (["model=globalvmamba-lite"], "4 levels leave the lowest one of 4 x 4 patches empty"),
    ],
)
def test_sizes_and_choices_that_cannot_be_built_are_one_sentence(overrides, words):
    # Another model has none of the sizes that the row gives to its own.
    row = [] if "model=globalvmamba-lite" in overrides else ["+experiment=digits-gm"]
    cfg = compose("globalmamba", [*row, "trainer.accelerator=cpu", *overrides])
    with pytest.raises(UserError, match=words) as error:
        network = build_model(cfg)
        network(next(iter(training_data(cfg).train_dataloader()))["images"])
    assert "\n" not in str(error.value)
