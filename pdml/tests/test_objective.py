"""What PDML minimises: which pixels enter the pair loss, what the softmax is over, that everything learns."""

import math

import pytest
import torch

from pdml.distributions import METRICS
from pdml.model import build_model
from pdml.objective import PAIR_LOSSES, Objective, draw_pixels
from shared.claims.compose import compose
from shared.data.keyed import keyed_permutation

EXACT = 1e-10  # float64, means over a few hundred pixels in another order
CONSTANT = 1e-6  # log 2 pi enters mutual_likelihood_score rounded to float32
CENTRES, PIXELS, CLASSES, WIDTH = 32, 700, 3, 4


def make_keys() -> torch.Tensor:
    """Return distinct keys (700,), negative for 32 pixels that lie among the others."""
    keys = torch.from_numpy(keyed_permutation(PIXELS, 3))
    return torch.where(keys % 21 == 0, keys - (1 << 62), keys)[torch.from_numpy(keyed_permutation(PIXELS, 4))]


def objective(metric: str, **changes) -> Objective:
    values = {"loss": "multi_similarity", "pair_weight": 0.1, "temperature": 10.0, "pixels": 256}
    torch.manual_seed(0)
    return Objective(metric, classes=CLASSES, width=WIDTH, **(values | changes)).double()


def pixels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(count) % CLASSES
    embedding = torch.randn(count, 2 * WIDTH, generator=generator, dtype=torch.float64)
    embedding[:, 0] += labels
    return embedding, labels


def test_at_most_256_pixels_are_drawn_and_centres_always_among_them():
    keys = make_keys()
    drawn = draw_pixels(keys, 256)
    assert len(drawn) == len(drawn.unique()) == 256
    assert 0 < (keys < 0).sum() < 256 and set((keys < 0).nonzero()[:, 0].tolist()) <= set(drawn.tolist())


@pytest.mark.parametrize("count", [1, 255, 256])
def test_fewer_pixels_are_all_drawn(count):
    assert sorted(draw_pixels(make_keys()[:count], 256).tolist()) == list(range(count))


def test_draw_depends_on_keys_not_on_the_order_in_which_pixels_come():
    keys, order = make_keys(), torch.from_numpy(keyed_permutation(PIXELS, 9))
    assert torch.equal(keys[draw_pixels(keys, 256)], keys[order][draw_pixels(keys[order], 256)])


@pytest.mark.parametrize("metric", METRICS)
def test_loss_and_calibration_do_not_depend_on_the_order_of_the_pixels(metric):
    (embedding, labels), keys = pixels(PIXELS), make_keys()
    order = torch.from_numpy(keyed_permutation(PIXELS, 9))
    one, other = objective(metric), objective(metric)
    loss = one(embedding, labels, keys)
    shuffled = other(embedding[order], labels[order], keys[order])
    torch.testing.assert_close(loss, shuffled, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(one.distance.scale, other.distance.scale, rtol=EXACT, atol=0)


def test_pair_loss_sees_the_drawn_pixels_with_their_own_labels(monkeypatch):
    (embedding, labels), keys, seen = pixels(PIXELS), make_keys(), []
    module = objective("wasserstein")
    monkeypatch.setattr(module.pair_loss, "forward", lambda *pair: seen.append(pair) or embedding.sum() * 0)
    module(embedding, labels, keys)
    drawn = draw_pixels(keys, 256)
    assert torch.equal(seen[0][0], embedding[drawn]) and torch.equal(seen[0][1], labels[drawn])


def test_calibration_is_read_once_from_the_first_pixels():
    (embedding, labels), keys = pixels(60), make_keys()[:60]
    module = objective("wasserstein")
    module(embedding, labels, keys)
    scale = module.distance.scale.clone()
    module(7 * embedding, labels, keys)
    assert scale != 1 and torch.equal(module.distance.scale, scale)


@pytest.mark.parametrize("metric, values", [("wasserstein", (4.25, 1.0)), ("mutual_likelihood", None)])
def test_class_part_is_minus_log_of_a_softmax_over_distances_to_every_class(metric, values):
    """One dimension, by hand: a pixel N(1, 1) and classes N(3, 1/4) and N(1, 4), the first one right."""
    torch.manual_seed(0)
    module = Objective(metric, "multi_similarity", 0.0, 3.0, 256, classes=2, width=1).double()
    module.classes.mean.data = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    module.classes.log_variance.data = torch.tensor([[0.25], [4.0]], dtype=torch.float64).log()
    module.distance.scale.fill_(2.0)
    module.distance.calibrated.fill_(True)
    if values is None:  # log N(1; 3, 1 + 1/4) and log N(1; 1, 1 + 4): larger is closer
        values = [0.5 * (d / v + math.log(2 * math.pi * v)) for d, v in ((4, 1.25), (0, 5))]
    first, second = (math.exp(-3.0 * value / 2.0) for value in values)
    embedding = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss = module(embedding, torch.tensor([0]), torch.tensor([0]))
    assert loss.item() == pytest.approx(-math.log(first / (first + second)), abs=CONSTANT)
    assert module.classes(embedding, module.distance).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_part_enters_with_its_weight(loss):
    (embedding, labels), keys = pixels(60), make_keys()[:60]
    values = [objective("wasserstein", loss=loss, pair_weight=w)(embedding, labels, keys) for w in (0, 1, 3)]
    torch.testing.assert_close(values[2] - values[0], 3 * (values[1] - values[0]), rtol=EXACT, atol=EXACT)
    assert values[1] > values[0]


@pytest.mark.parametrize("metric", METRICS)
def test_every_parameter_of_pdml_learns(metric):
    """In particular both heads and every class distribution; the loss is the default one."""
    cfg = compose("pdml", [f"method.model.metric={metric}"])
    assert (cfg.method.model.loss, cfg.method.model.pair_weight) == ("multi_similarity", 0.1)
    torch.manual_seed(0)
    model = build_model(cfg, bands=40, classes=3)
    model.spectral.weight.normal_()
    labels = torch.randint(0, 4, (6, 9, 9))
    rows, chosen = model.rows(torch.randn(6, 40, 9, 9), labels)
    model.loss(rows, labels[chosen] - 1, torch.arange(len(rows))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []
    # Every dimension of the distributions; a feature of the backbone may be dead in one batch.
    for part in (model.heads, model.objective.classes):
        assert all(p.grad.flatten(1).any(1).all() if p.dim() > 1 else p.grad.all() for p in part.parameters())
