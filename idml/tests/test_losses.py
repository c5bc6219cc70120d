"""The seven losses, plain and introspective: gradients everywhere, equality where there is no uncertainty."""

import itertools
import math

import pytest
import torch

from idml.distance_weighted import DistanceWeightedSampler
from idml.introspective import IntrospectiveDistance
from idml.losses import BUILDERS, build_loss
from idml.tools.first_gradients import ABBREVIATIONS, NETWORKS, first_step
from shared.errors import UserError

CLASSES, S, U, PER_CLASS = 4, 6, 3, 4
CONSTANTS = {
    "triplet": {"margin": 0.1},
    "proxynca": {"scale": 32.0},
    "fastap": {"bins": 10},
    "contrastive": {"positive_margin": 0.0, "negative_margin": 0.5, "reduction": "pooled"},
    "margin": {"margin": 0.2, "beta": 1.2, "nu": 0.0, "cutoff": 0.5, "farthest": 1.4},
    "multi-similarity": {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1},
    "proxy-anchor": {"alpha": 32.0, "margin": 0.1},
}
PLAIN = {"name": "plain"}
INTROSPECTIVE = {"name": "introspective", "form": "printed", "tau": 1.0, "offset": 0.0}
INTROSPECTIVE |= {"scaling": "rms", "combination": "sum"}
LABELS = torch.arange(CLASSES).repeat_interleave(PER_CLASS)


def made(name: str, metric: dict = INTROSPECTIVE):
    torch.manual_seed(0)
    loss = build_loss({"name": name, **CONSTANTS[name]}, metric, CLASSES, S)
    if hasattr(loss.miner, "seed_step"):
        loss.miner.seed_step(3)
    return loss


def embeddings(width: int = S + U, spread: float = 1.0) -> torch.Tensor:
    """Return samples about their class centres, so that near and far, easy and hard pairs all occur."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, S + U, generator=generator)
    return (centres[LABELS] + spread * torch.randn(len(LABELS), S + U, generator=generator))[:, :width]


def test_all_seven_are_here():
    assert sorted(BUILDERS) == sorted(CONSTANTS) and len(BUILDERS) == 7


@pytest.mark.parametrize("name", BUILDERS)
def test_semantic_uncertainty_and_proxies_all_get_gradient(name):
    loss, x = made(name), embeddings().requires_grad_()
    loss(x, LABELS).backward()
    assert (x.grad[:, :S].abs().sum(0) > 1e-8).all() and (x.grad[:, S:].abs().sum(0) > 1e-8).all()
    for parameter in loss.proxies():
        assert parameter.grad is not None and (parameter.grad.abs() > 0).any()


@pytest.mark.parametrize("name", BUILDERS)
def test_without_uncertainty_the_introspective_loss_is_the_baseline(name):
    x = embeddings()
    x[:, S:] = 0
    torch.testing.assert_close(made(name)(x, LABELS), made(name, PLAIN)(x[:, :S], LABELS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_uncertainty_changes_the_loss(name):
    x = embeddings()
    sure = torch.cat([x[:, :S], 0 * x[:, S:]], 1)
    assert abs(made(name)(x, LABELS) - made(name)(sure, LABELS)) > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_miner_and_loss_share_one_distance(name):
    loss = made(name)
    assert loss.miner is None or loss.miner.distance is loss.loss.distance


@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.startswith("proxy")])
def test_a_batch_of_one_class_is_one_sentence(name):
    with pytest.raises(UserError, match="a batch of 16 images has one class alone"):
        made(name)(embeddings(), 0 * LABELS)


@pytest.mark.parametrize("name", BUILDERS)
def test_half_precision_embeddings_are_measured_in_single_precision(name):
    x = embeddings().bfloat16()
    expected = made(name)(x.float(), LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        actual = made(name)(x, LABELS)
    torch.testing.assert_close(actual, expected)


def test_a_reduction_that_is_unknown_is_one_sentence():
    constants = {**CONSTANTS["contrastive"], "reduction": "sum"}
    with pytest.raises(UserError, match="loss.reduction=sum: choose it from pooled, separate"):
        build_loss({"name": "contrastive", **constants}, PLAIN, CLASSES, S)


def test_names_that_mean_nothing_and_the_released_metric_elsewhere_are_refused():
    with pytest.raises(UserError, match=r"loss.name=npair.* choose the loss from triplet"):
        build_loss({"name": "npair"}, PLAIN, CLASSES, S)
    with pytest.raises(UserError, match="not defined, the released wrapper takes no uncertainty"):
        build_loss({"name": "triplet", "margin": 0.1}, {"name": "released"}, CLASSES, S)


def sampler(cutoff: float = 0.5, farthest: float = 1.4) -> DistanceWeightedSampler:
    distance = IntrospectiveDistance(S, "printed", 1.0, 0.0, "rms", "sum")
    return DistanceWeightedSampler(S, cutoff, farthest, distance=distance)


def test_distance_weights_are_one_over_the_density_on_the_sphere_of_the_semantic_width():
    distances = torch.tensor([[0.0, 0.3, 0.9, 1.2, 1.39, 1.6]], dtype=torch.float64)
    negative = torch.tensor([[False, True, True, True, True, True]])
    actual = sampler().weights(distances, negative)[0].tolist()

    def inverse_density(d):
        return 1 / (d ** (S - 2) * (1 - d * d / 4) ** ((S - 3) / 2))

    expected = [0.0, *map(inverse_density, (0.5, 0.9, 1.2, 1.39)), 0.0]
    total = sum(expected)
    assert all(math.isclose(a, b / total, rel_tol=1e-12) for a, b in zip(actual, expected, strict=True))


def test_an_anchor_whose_negatives_are_all_far_draws_from_them_alike_and_one_without_negatives_from_none():
    distances = torch.tensor([[0.0, 1.5, 1.9], [1.5, 0.0, 1.9], [0.3, 0.3, 0.0]])
    negative = torch.tensor([[False, True, True], [True, False, True], [False, False, False]])
    actual = sampler().weights(distances, negative)
    torch.testing.assert_close(actual, torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]))


def test_the_sampler_draws_a_negative_for_every_pair_of_a_class_as_a_function_of_the_step():
    miner = sampler()

    def draw(seed):
        miner.seed_step(seed)
        return torch.stack(miner(embeddings(), LABELS))

    anchors, positives, negatives = draw(1)
    pairs = set(zip(anchors.tolist(), positives.tolist(), strict=True))
    assert pairs == {(a, b) for a, b in itertools.permutations(range(16), 2) if LABELS[a] == LABELS[b]}
    assert (LABELS[anchors] != LABELS[negatives]).all()
    assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))


@pytest.mark.parametrize("reduction", ["pooled", "separate"])
def test_contrastive_pools_its_pairs_as_gedml_or_weighs_both_kinds_alike(reduction):
    loss = build_loss(
        {"name": "contrastive", "positive_margin": -0.2, "negative_margin": 1.4, "reduction": reduction},
        PLAIN,
        CLASSES,
        S,
    )
    x = embeddings(S)
    distances = torch.cdist(*[torch.nn.functional.normalize(x, dim=1)] * 2)
    same = (LABELS[:, None] == LABELS) & ~torch.eye(len(LABELS), dtype=torch.bool)
    pulled, pushed = (distances[same] + 0.2).relu(), (1.4 - distances[LABELS[:, None] != LABELS]).relu()
    pulled, pushed = pulled[pulled > 0], pushed[pushed > 0]
    expected = torch.cat([pulled, pushed]).mean() if reduction == "pooled" else pulled.mean() + pushed.mean()
    torch.testing.assert_close(loss(x, LABELS), expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_first_step_of_a_fresh_network_gives_its_backbone_and_its_uncertainty_a_gradient(name):
    step = first_step(f"cub50-idml-{ABBREVIATIONS[name]}", 0, NETWORKS["convnet-tiny"])
    assert step.backbone > 1e-4 and math.isfinite(step.backbone)
    assert step.head > 1e-6 and math.isfinite(step.head)


def test_unscaled_uncertainties_would_leave_a_fresh_network_without_any():
    overrides = [*NETWORKS["convnet-tiny"], "metric.scaling=raw", "metric.tau=0.01"]
    step = first_step("cub50-idml-con", 0, overrides)
    assert max(step.backbone, step.head) < 1e-6


def test_under_proxy_anchor_the_first_step_makes_clean_and_mixed_images_surer_alike():
    step = first_step("cub50-idml-pa", 0, NETWORKS["convnet-tiny"])
    clean, mixed = step.lengthened
    assert clean < 0.05 and mixed < 0.05
