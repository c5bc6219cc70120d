"""The serialization against the release's golden file, its formulas written out, and what must hold of any."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from globalmamba.serialization import FrequencySerialization, token_grids
from globalmamba.spectrum import area_matrix, band_masks
from shared.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "globalmamba_tokens_as_released.npz"
GOLDEN_TOLERANCE = 1e-9  # the bar of the golden files in float64
GOLDEN_FLOAT32 = 1e-7  # the low-passed images are stored in float32: half a unit in the last place is 6e-8
EXACT = 1e-12  # float64, the same sums in another order
HALF_OUTPUT = 2**-7  # bfloat16 keeps 8 bits; twice its rounding
VARIANTS = ("as_written", "as_released")
BANDS = ("nested", "disjoint")
CONTENTS = ("frequency", "replicated", "resized", "averaged")


def build(size=(16, 24), patch=2, levels=3, width=5, **choices) -> FrequencySerialization:
    torch.manual_seed(0)
    return FrequencySerialization(
        image_size=size, patch_size=patch, embed_dim=width, levels=levels, in_channels=2, **choices
    )


def picture(size=(16, 24), batch=2) -> torch.Tensor:
    return torch.randn(batch, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def plain_dct(size: int) -> torch.Tensor:
    """DCT-II by its definition, (frequency, place); the inverse is its transpose over the squared norms."""
    rows = [[math.cos((2 * i + 1) * u * math.pi / (2 * size)) for i in range(size)] for u in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


def plain_levels(images: torch.Tensor, levels: int, bands: str) -> list[torch.Tensor]:
    """x^k by the definition: full transform, mask, full inverse."""
    height, width = images.shape[-2:]
    rows, columns = plain_dct(height), plain_dct(width)
    spectrum = torch.einsum("ui,bcij,vj->bcuv", rows, images, columns)
    norms = rows.square().sum(1)[:, None] * columns.square().sum(1)
    masks = [torch.from_numpy(mask) for mask in band_masks(height, width, levels, bands)]
    return [torch.einsum("ui,bcuv,vj->bcij", rows, spectrum * mask / norms, columns) for mask in masks]


def plain_tokens(module: FrequencySerialization, images: torch.Tensor) -> torch.Tensor:
    """Tokens, low to high, with the shrinking and the convolution that the variant names."""
    p, weight, bias = module.patch_size, module.proj.weight, module.proj.bias
    tokens = []
    for x, (h, w) in zip(plain_levels(images, module.levels, module.bands), module.grids, strict=True):
        if module.variant == "as_released":
            full = F.conv2d(x, weight, bias, stride=p)
            grid = F.interpolate(full, size=(h, w), mode="bilinear", align_corners=False)
        else:
            small = F.interpolate(x, size=(p * h, p * w), mode="bilinear", align_corners=False)
            grid = F.conv2d(small, weight, bias, stride=p)
        tokens.append(grid.flatten(2).transpose(1, 2))
    return torch.cat(tokens, 1)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def released(golden) -> FrequencySerialization:
    module = FrequencySerialization(image_size=224, patch_size=16, embed_dim=8, variant="as_released").double()
    module.load_state_dict({"proj.weight": golden["param_proj_weight"], "proj.bias": golden["param_proj_bias"]})
    return module


def test_as_released_gives_the_tokens_of_the_release(golden, released):
    tokens = released(golden["in_image"].double())
    assert relative(tokens, golden["out_tokens"]) < GOLDEN_TOLERANCE
    assert [rows * columns for rows, columns in released.grids] == golden["out_level_sizes"].tolist()
    assert released.num_tokens == 255


def test_low_passed_images_and_kept_coefficients_are_those_of_the_release(golden, released):
    levels = released.level_images(golden["in_image"].double())
    expected = golden["out_lowpass_channel0"].double()
    assert all(relative(x[0, 0], e) < GOLDEN_FLOAT32 for x, e in zip(levels, expected, strict=True))
    assert [mask.sum() for mask in band_masks(224, 224, 4, "nested")] == golden["mask_kept"].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize(
    ("size", "patch", "levels"),
    [((16, 16), 4, 2), ((16, 24), 2, 3), ((21, 15), 3, 3), ((56, 56), 4, 4), ((32, 48), 2, 5), ((32, 32), 1, 6)],
)
def test_products_of_small_matrices_equal_the_formulas_written_out(variant, bands, size, patch, levels):
    module = build(size, patch, levels, variant=variant, bands=bands).double()
    images = picture(size)
    assert relative(module(images), plain_tokens(module, images)) < EXACT
    for fast, plain in zip(module.level_images(images), plain_levels(images, levels, bands), strict=True):
        assert relative(fast, plain) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bands", BANDS)
def test_gradients_equal_those_of_the_formulas_written_out(variant, bands):
    module = build(variant=variant, bands=bands).double()
    images, weights = picture().requires_grad_(), torch.randn(1, module.num_tokens, 5, dtype=torch.float64)
    sources = [images, *module.parameters()]
    fast = torch.autograd.grad((module(images) * weights).sum(), sources)
    plain = torch.autograd.grad((plain_tokens(module, images) * weights).sum(), sources)
    assert all(relative(f, p) < EXACT for f, p in zip(fast, plain, strict=True))


def test_the_last_nested_level_is_the_image_itself():
    images = picture()
    assert torch.equal(build().double().level_images(images)[-1], images)


def test_disjoint_levels_sum_to_the_image_and_share_no_coefficient():
    images = picture()
    assert relative(sum(build(bands="disjoint").double().level_images(images)), images) < EXACT
    assert (sum(m.astype(int) for m in band_masks(16, 24, 3, "disjoint")) == 1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_constant_image_is_the_same_constant_in_every_level(variant):
    images = torch.full((1, 2, 16, 24), 3.0, dtype=torch.float64)
    module = build(variant=variant).double()
    for level in [*module.level_images(images), *module.shrunk_images(images)]:
        assert relative(level, torch.full_like(level, 3.0)) < EXACT
    tokens = module(images)
    assert relative(tokens, tokens[:, :1].expand_as(tokens)) < EXACT


def test_orders_are_permutations_of_each_other_and_raster_order_stays_inside_a_level():
    images = picture()
    low_high = build().double()(images)
    assert torch.equal(build(order="high-low").double()(images), torch.cat(low_high.split([6, 24, 96], 1)[::-1], 1))
    shuffled = build(order="random").double()(images)
    matches = (shuffled[0, :, None] == low_high[0, None]).all(-1)  # (T, T)
    assert (matches.sum(0) == 1).all() and (matches.sum(1) == 1).all() and not torch.equal(shuffled, low_high)


def test_random_order_is_the_same_at_every_construction_and_another_for_another_seed():
    one, again, other = (build(order="random", order_seed=seed).permutation for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_level_tokens_are_the_sequence_before_its_order():
    images, module = picture(), build(order="high-low").double()
    levels = module.level_tokens(images)
    assert [tuple(level.shape[2:]) for level in levels] == list(module.grids) == [(2, 3), (4, 6), (8, 12)]
    flat = [level.flatten(2).transpose(1, 2) for level in levels]
    assert torch.equal(module(images), torch.cat(flat[::-1], 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_replicated_content_is_the_tokens_of_the_image_under_the_centres_of_the_cells(variant):
    images, module = picture(), build(content="replicated", variant=variant).double()
    low, _, top = module.level_tokens(images)
    assert torch.equal(top, module.proj(images))
    assert relative(low, top[:, :, [2, 6]][..., [2, 6, 10]]) < EXACT


def test_resized_content_is_the_shrunk_image_without_a_low_pass():
    images, module = picture(), build(content="resized").double()
    for level, (h, w) in zip(module.level_tokens(images), module.grids, strict=True):
        small = F.interpolate(images, size=(2 * h, 2 * w), mode="bilinear", align_corners=False)
        assert relative(level, module.proj(small)) < EXACT
    assert relative(module(images), build().double()(images)) > 0.1


def test_averaged_content_is_shrunk_by_the_mean_over_each_pixels_area():
    images, module = picture(), build(content="averaged").double()
    for level, image, (h, w) in zip(
        module.level_tokens(images), module.shrunk_images(images), module.grids, strict=True
    ):
        # Nothing is lost, whatever the ratio: the mean of the image stays.
        assert relative(image.mean((2, 3)), images.mean((2, 3))) < EXACT
        rows, columns = images.shape[2] / (2 * h), images.shape[3] / (2 * w)
        if rows == columns == int(rows):
            assert relative(level, module.proj(F.avg_pool2d(images, int(rows)))) < EXACT


def test_area_means_of_parts_of_pixels():
    assert np.allclose(area_matrix(2, 3), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], atol=EXACT)
    assert np.allclose(area_matrix(3, 14).sum(1), 1, atol=EXACT)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_gradient_and_every_content_has_the_same_tokens(content, bands, variant):
    module = build(content=content, bands=bands, variant=variant)
    tokens = module(picture().float())
    tokens.square().sum().backward()
    assert tokens.shape == (2, module.num_tokens, 5) and module.grids == ((2, 3), (4, 6), (8, 12))
    assert all(p.grad.norm() > 0 for p in module.parameters())


def test_a_state_holds_the_convolution_alone_and_reloads_to_identical_tokens():
    images, module = picture().float(), build()
    assert set(module.state_dict()) == {"proj.weight", "proj.bias"}
    torch.manual_seed(5)
    other = FrequencySerialization(image_size=(16, 24), patch_size=2, embed_dim=5, levels=3, in_channels=2)
    assert not torch.equal(other(images), module(images))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.to("cpu")(images), module(images))
    assert torch.equal(copy.deepcopy(module)(images), module(images))


def test_a_change_of_dtype_never_rounds_the_constants_twice():
    images, exact = picture(), build().double()
    moved = build().half().double()
    moved.load_state_dict(exact.state_dict())
    assert torch.equal(moved(images), exact(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_transform_stays_in_float32_under_autocast(variant):
    images, module = picture().float(), build(variant=variant)
    expected, tokens = module.shrunk_images(images), module(images)
    with torch.autocast("cpu", torch.bfloat16):
        shrunk, half = module.shrunk_images(images), module(images)
    assert all(torch.equal(s, e) for s, e in zip(shrunk, expected, strict=True))
    assert half.dtype == torch.bfloat16 and relative(half.float(), tokens) < HALF_OUTPUT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("content", CONTENTS)
def test_half_precision_works_on_a_cpu(dtype, content):
    images, module = picture().float(), build(content=content)
    tokens = module(images)
    assert module(images.to(dtype)).dtype == torch.float32  # images alone: promoted
    half = copy.deepcopy(module).to(dtype)(images.to(dtype))
    assert half.dtype == dtype and relative(half.float(), tokens) < HALF_OUTPUT


@pytest.mark.slow  # the first export of a process imports for seconds
@pytest.mark.parametrize("choices", [{}, {"bands": "disjoint", "order": "random"}, {"content": "replicated"}])
def test_export_and_compile_give_the_same_tokens(choices):
    images, module = picture().float(), build(**choices)
    exported = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    more = picture(batch=3).float()
    assert torch.equal(exported(more), module(more)) and torch.equal(compiled(more), module(more))


def test_sizes_can_be_counted_on_the_meta_device():
    module = build().to("meta")
    assert module(torch.empty(2, 2, 16, 24, device="meta")).shape == (2, module.num_tokens, 5)


def test_a_module_made_on_the_meta_device_has_its_constants_once_it_is_somewhere():
    with torch.device("meta"):
        module = build()
    module, expected = module.to_empty(device="cpu"), build()
    module.load_state_dict(expected.state_dict())
    assert torch.equal(module(picture().float()), expected(picture().float()))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image_size": 8, "patch_size": 16}, "smaller than a patch of 16"),
        ({"image_size": (32, 40), "patch_size": 16}, "no whole number of patches of 16"),
        ({"image_size": 32, "patch_size": 4, "levels": 5}, "use at most 4 levels"),
        ({"image_size": 16, "patch_size": 16, "levels": 2}, "use larger images or smaller patches"),
        ({"image_size": 32, "patch_size": 1, "levels": 1}, "from 2 to 6"),
        ({"image_size": 128, "patch_size": 1, "levels": 7}, "from 2 to 6"),
        ({"image_size": 32, "patch_size": 4, "variant": "paper"}, "as_written, as_released"),
        ({"image_size": 32, "patch_size": 4, "bands": "wide"}, "nested, disjoint"),
        ({"image_size": 32, "patch_size": 4, "order": "high"}, "low-high, high-low, random"),
        ({"image_size": 32, "patch_size": 4, "content": "none"}, "frequency, replicated, resized"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_with_a_remedy(arguments, says):
    with pytest.raises(UserError, match=says):
        FrequencySerialization(embed_dim=4, **arguments)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 3, 16, 24), (2, 16, 24)])
def test_images_of_another_shape_are_refused_with_both_shapes(content, shape):
    with pytest.raises(UserError, match=r"\(batch, 2, 16, 24\), got \(\d"):
        build(content=content)(torch.zeros(shape))


def test_grids_are_the_floors_of_the_patch_grid():
    assert token_grids((224, 224), 16, 4) == ((1, 1), (3, 3), (7, 7), (14, 14))
    assert token_grids((64, 96), 4, 5) == ((1, 1), (2, 3), (4, 6), (8, 12), (16, 24))
