"""The masked-image space and the spaces above it, compared with loops over images and patches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from opera.backbones import build_backbone, sine_cosine_positions
from opera.config import CONFIGS
from opera.hierarchy import UNLABELLED, conflict
from opera.masked import MASKED_ARRANGEMENTS, MaskedHierarchy
from opera.tests.test_hierarchy import HEADS
from shared.errors import UserError
from shared.testing.gloo import on_ranks
from shared.training.ranks import with_global_batchnorm

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64; the loops add the same numbers in another order
SIZE, CLASSES, BATCH = 16, 6, 5  # 8 x 8 patches of 2 x 2 pixels
MASK = {"ratio": 0.75, "width": 16, "depth": 2, "heads": 2, "weight": 1.0, "train_patches": True}
KEY = (3, 1, np.arange(BATCH) + 7)


def small(arrangement: str = "masked-hierarchy", backbone: str = "vit-tiny", seed: int = 0, **options):
    torch.manual_seed(seed)
    mask = MASK | {name: options.pop(name) for name in list(options) if name in MASK}
    options = {"temperature": 0.5} | options
    network = build_backbone(backbone, SIZE)
    if backbone == "vit-tiny":
        network.blocks = network.blocks[:2]
    return MaskedHierarchy(network, CLASSES, HEADS, arrangement, mask=mask, **options).double().train()


def batch() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    views = [torch.randn(BATCH, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) for _ in range(2)]
    return *views, torch.tensor([0, 1, UNLABELLED, 3, 1])


def cut(image: torch.Tensor, place: int) -> torch.Tensor:
    """Return the pixels (3, 2, 2) of one patch."""
    row, column = divmod(place, 8)
    return image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]


def looped(model: MaskedHierarchy, image: torch.Tensor, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (C,) and the mean squared error of one image, its patches at their rows and columns."""
    vit, decoder, hidden = model.online.backbone, model.decoder, set(order[16:])
    project = vit.patch_embed.proj
    tokens = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
    for place in range(64):
        if place not in hidden:
            token = project.weight.flatten(1) @ cut(image, place).flatten() + project.bias
            tokens.append(token + vit.pos_embed[0, 1 + place])
    tokens = vit.norm(vit.blocks(torch.stack(tokens)[None]))[0]
    seen = iter(decoder.embed(tokens))
    positions = sine_cosine_positions(8, 8, 16)[0].double()
    row = [next(seen) + positions[0]]
    for place in range(64):
        row.append((decoder.mask_token[0, 0] if place in hidden else next(seen)) + positions[1 + place])
    predicted = decoder.pixels(decoder.norm(decoder.blocks(torch.stack(row)[None])))[0, 1:]
    errors = []
    for place in hidden:
        pixels = cut(image, place).permute(1, 2, 0).flatten()
        spread = ((pixels - pixels.mean()).square().sum() / 11 + 1e-6).sqrt()
        errors.append((predicted[place] - (pixels - pixels.mean()) / spread).square().mean())
    return tokens[0], torch.stack(errors).mean()


def hidden_pixels(model: MaskedHierarchy, order: torch.Tensor) -> torch.Tensor:
    """Return which pixels (B, 1, S, S) are hidden."""
    patches = torch.zeros(len(order), 64).scatter(1, order[:, -model.hidden :], 1.0).view(-1, 1, 8, 8)
    return nn.functional.interpolate(patches, scale_factor=2).bool()


def test_every_patch_is_visible_or_hidden_and_three_quarters_are_hidden():
    model = small()
    for key in (None, KEY):
        order = model.order(BATCH, 0, key)
        assert (order.shape, model.hidden) == ((BATCH, 64), 48)
        assert torch.equal(order.sort(1).values, torch.arange(64).expand(BATCH, -1))
    views = model.spaces(*batch()[:2])
    assert all(view["tokens"].shape == (BATCH, 1 + 16, 192) for view in views)
    assert not torch.equal(views[0]["order"], views[1]["order"])


def test_patches_are_hidden_evenly():
    model = small()
    counts = torch.zeros(64)
    for image in model.order(4000, 0)[:, -48:]:
        counts[image] += 1
    # Each patch of 4000 images: binomial, 3000 with deviation 27.
    assert (counts - 3000).abs().max() < 5 * 27.4


def test_what_a_key_hides_depends_on_seed_epoch_image_and_view_and_on_nothing_else():
    model, (seed, epoch, index) = small(), KEY
    whole = model.order(BATCH, 0, KEY)
    torch.rand(3)
    assert torch.equal(model.order(2, 0, (seed, epoch, index[3:])), whole[3:])
    others = [
        model.order(BATCH, 1, KEY),
        model.order(BATCH, 0, (seed + 1, epoch, index)),
        model.order(BATCH, 0, (seed, epoch + 1, index)),
        whole.roll(1, 0),
    ]
    assert not any((other == whole).all(1).any() for other in others)


@pytest.mark.parametrize("arrangement", MASKED_ARRANGEMENTS)
def test_the_objective_is_that_of_loops_over_images_and_patches(arrangement):
    model, (first, second, labels) = small(arrangement, weight=0.7, temperature=0.3), batch()
    views = (first, second)
    actual = [
        [looped(model, image, order) for image, order in zip(view, model.order(BATCH, n, KEY).tolist(), strict=True)]
        for n, view in enumerate(views)
    ]
    masked = torch.stack([error for view in actual for _, error in view]).mean()
    instance = classes = torch.zeros((), dtype=torch.float64)
    if arrangement == "masked-hierarchy":
        for number, view in enumerate(actual):
            q = model.predictor(model.online.projector(torch.stack([y for y, _ in view])))
            keys = model.momentum.projector(model.momentum.backbone(views[1 - number]))
            similarity = torch.cosine_similarity(q[:, None], keys[None], dim=2) / 0.3
            instance = instance - similarity.log_softmax(1).diag().mean()
            logits = model.class_head(q).log_softmax(1)
            losses = [-logits[i, label] for i, label in enumerate(labels.tolist()) if label >= 0]
            classes = classes + torch.stack(losses).mean()
    terms = model(first, second, labels, KEY)
    for one, expected in zip(
        terms, (0.7 * masked + 0.3 * instance + 0.5 * classes, instance, classes, masked), strict=True
    ):
        torch.testing.assert_close(one, expected, **CLOSE)


def test_printed_weights_are_all_one():
    terms = small(loss_weights="printed")(*batch())
    torch.testing.assert_close(terms.total, terms.masked + terms.instance + terms.classes, **CLOSE)


@pytest.mark.parametrize("arrangement", MASKED_ARRANGEMENTS)
@pytest.mark.parametrize("train_patches", [True, False])
def test_every_parameter_that_trains_gets_gradient_and_the_momentum_encoder_none(arrangement, train_patches):
    model = small(arrangement, train_patches=train_patches)
    model(*batch()).total.backward()
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    projection = {f"online.backbone.patch_embed.proj.{name}" for name in ("weight", "bias")}
    momentum = {name for name, _ in model.named_parameters() if name.startswith("momentum")}
    assert fixed == {"online.backbone.pos_embed"} | momentum | (set() if train_patches else projection)
    assert bool(momentum) == (arrangement == "masked-hierarchy")
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (name not in fixed), name


def test_hidden_pixels_do_not_reach_the_encoder_and_visible_ones_are_no_target():
    model, (first, second, _) = small(), batch()
    hidden = [hidden_pixels(model, model.order(BATCH, view, KEY)) for view in (0, 1)]
    views = model.spaces(first, second, KEY)
    # Not a number: wherever it goes it shows.
    unseen = [one.masked_fill(where, torch.nan) for one, where in zip((first, second), hidden, strict=True)]
    for one, other in zip(views, model.spaces(*unseen, KEY), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("y", "z", "q", "tokens"))
    seen = [one.masked_fill(~where, torch.nan) for one, where in zip((first, second), hidden, strict=True)]
    term = model.masked_term(views, first, second)
    assert torch.equal(model.masked_term(views, *seen), term)
    assert model.masked_term(views, *unseen).isnan()
    changed = [one + where * torch.randn_like(one) for one, where in zip((first, second), hidden, strict=True)]
    assert not torch.allclose(model.masked_term(views, *changed), term)


def test_the_target_minds_neither_brightness_nor_contrast_of_a_patch():
    model, (first, second, _) = small(), batch()
    views = model.spaces(first, second, KEY)
    term = model.masked_term(views, first, second)
    # The 1e-6 beside a variance of about 1 is what differs.
    torch.testing.assert_close(model.masked_term(views, 3 * first + 2, second), term, rtol=1e-5, atol=0)


@pytest.mark.parametrize("arrangement", MASKED_ARRANGEMENTS)
def test_features_are_those_of_the_whole_image(arrangement):
    model, (first, _, _) = small(arrangement), batch()
    features = model.features(first)
    assert torch.equal(features, model.online.backbone(first)) and features.shape == (BATCH, 192)
    # The encoder of all patches, in any order, is the backbone.
    tokens = model.encoded(first, model.order(BATCH, 0))
    torch.testing.assert_close(tokens[:, 0], features, **CLOSE)
    torch.testing.assert_close(model.encoded(first, model.order(BATCH, 0)[:, :16])[:, 0].shape, features.shape)


def test_keys_are_the_momentum_encoders_of_whole_views_and_it_follows_the_online_one():
    model, (first, second, _) = small(), batch()
    expected = model.momentum.projector(model.momentum.backbone(second))
    torch.testing.assert_close(model.keys(first, second)[1], expected, **CLOSE)
    before = [p.clone() for p in model.momentum.parameters()]
    with torch.no_grad():
        for parameter in model.online.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.update_momentum(0.9)
    for old, now, online in zip(before, model.momentum.parameters(), model.online.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * online.detach(), **CLOSE)
    small("masked").update_momentum(0.9)  # has none


def test_the_same_torch_seed_hides_the_same_and_another_does_not():
    model, inputs = small(), batch()

    def total(seed: int):
        torch.manual_seed(seed)
        return model(*inputs).total

    assert torch.equal(total(4), total(4)) and not torch.equal(total(4), total(5))
    orders, before = [], torch.get_default_dtype()
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(4)
        torch.set_default_dtype(dtype)
        orders.append(model.to(dtype).order(BATCH, 0))
    torch.set_default_dtype(before)
    assert torch.equal(*orders)


def test_the_conflict_of_instances_and_classes_is_measured_on_masked_views():
    model, (first, second, labels) = small(), batch()
    torch.manual_seed(2)
    actual = conflict(model, first, second, labels)
    torch.manual_seed(2)
    views = model.spaces(first, second)
    terms = model.terms(views, first, second, labels)
    y = [view["y"] for view in views]
    a, b = (torch.cat(torch.autograd.grad(term, y, retain_graph=True)).flatten() for term in terms)
    assert actual == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-9)
    with pytest.raises(UserError, match="has one objective alone"):
        conflict(small("masked"), first, second, labels)


@pytest.mark.parametrize("name", ["mae", "opera-mae"])
def test_the_objectives_of_the_rows_are_mae_s_on_a_large_vit(name):
    values = OmegaConf.load(Path(CONFIGS) / f"objective/{name}.yaml")
    with torch.device("meta"):
        backbone = build_backbone("vit-base", 224)
        model = MaskedHierarchy(
            backbone,
            1000,
            HEADS,
            values.arrangement,
            values.temperature,
            OmegaConf.to_container(values.mask),
            values.loss_weights,
            values.denominator,
        )
    assert (model.patches, model.hidden, len(model.decoder.blocks)) == (196, 147, 8)
    assert model.decoder.embed.weight.shape == (512, 768)
    assert model.decoder.pixels.weight.shape == (768, 512)
    assert (model.predictor is None) == (name == "mae")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backbone": "resnet-small"}, "this backbone has none: set model.backbone to one of vit-small"),
        ({"ratio": 0.0}, "ratio=0.0 hides all of 64 patches or none: set a part"),
        ({"ratio": 0.001}, "ratio=0.001 hides all of 64"),
        ({"ratio": 0.999}, "ratio=0.999 hides all of 64"),
        ({"ratio": 1.0}, "ratio=1.0 hides all of 64"),
        ({"ratio": float("nan")}, "ratio=nan hides all of 64"),
        ({"weight": 0.0}, "mask.weight=0.0: set it above 0"),
        ({"width": 18}, "mask.width=18 with objective.mask.heads=2: set a width"),
        ({"heads": 3}, "mask.heads=3: set a width"),
        ({"depth": 0}, "mask.depth=0 decodes nothing: set 1"),
        ({"arrangement": "hierarchy"}, "arrangement=hierarchy masks nothing: choose one of masked"),
        ({"loss_weights": "equal"}, "loss_weights=equal is unknown"),
        ({"temperature": 0.0}, "temperature=0.0: set it above 0"),
    ],
)
def test_bad_input_is_one_sentence(options, words):
    with pytest.raises(UserError, match=words) as error:
        small(**options)
    assert "\n" not in str(error.value)


def test_classes_are_needed_above_a_masked_space_and_not_by_it_alone():
    network = build_backbone("vit-tiny", SIZE)
    with pytest.raises(UserError, match="arrangement=masked-hierarchy needs labels .* choose masked"):
        MaskedHierarchy(network, 0, HEADS, "masked-hierarchy", 1.0, MASK)
    assert MaskedHierarchy(network, 0, HEADS, "masked", 1.0, MASK).class_head is None


def step(rank: int, ranks: int) -> dict:
    """Return the terms and gradients of this rank's part of the batch, three images and two."""
    rows = slice(None) if ranks == 1 else (slice(0, 3), slice(3, None))[rank]
    actual = {}
    for arrangement in MASKED_ARRANGEMENTS:
        model = with_global_batchnorm(small(arrangement))
        seed, epoch, index = KEY
        wrapped = DistributedDataParallel(model) if ranks > 1 else model
        terms = wrapped(*(part[rows] for part in batch()), (seed, epoch, index[rows]))
        terms.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        actual[arrangement] = {"terms": torch.stack([term.detach() for term in terms])} | gradients
    return actual


@pytest.mark.slow
def test_two_ranks_equal_one_process_where_a_key_says_what_is_hidden(tmp_path):
    whole = step(0, 1)
    for part in on_ranks(2, step, tmp_path, 2):
        for arrangement in MASKED_ARRANGEMENTS:
            assert set(part[arrangement]) == set(whole[arrangement])
            for name, value in whole[arrangement].items():
                torch.testing.assert_close(part[arrangement][name], value, msg=name, rtol=1e-9, atol=1e-11)
