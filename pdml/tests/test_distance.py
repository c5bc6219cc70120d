"""The Gaussian metrics as a distance of pytorch_metric_learning: with its losses, calibrated, saved."""

import logging

import pytest
import torch

from pdml.distance import GaussianDistance, split_embedding
from pdml.distributions import METRICS
from pdml.objective import PAIR_LOSSES, ClassDistributions, Objective, pair_loss

EXACT = 1e-12  # float64, a dozen terms of order one
CALIBRATED = 1e-5  # float32: differences of numbers up to a hundred, divided by their median
CLASSES, WIDTH, EACH = 3, 4, 6
ALL = pytest.mark.parametrize("name", METRICS)


def embedding(dtype=torch.float32) -> torch.Tensor:
    """Return (18, 8) = [mean | log-variance], six pixels of each of three classes in overlapping clouds."""
    generator = torch.Generator().manual_seed(1)
    centres = 1.5 * torch.randn(CLASSES, WIDTH, generator=generator).repeat_interleave(EACH, 0)
    mean = centres + torch.randn(CLASSES * EACH, WIDTH, generator=generator)
    log_variance = torch.randn(CLASSES * EACH, WIDTH, generator=generator) - 1
    return torch.cat([mean, log_variance], 1).to(dtype)


LABELS = torch.arange(CLASSES).repeat_interleave(EACH)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@ALL
def test_library_loss_is_finite_and_moves_means_and_variances(name, loss):
    torch.manual_seed(0)
    distance = GaussianDistance(name)
    pixels = embedding().requires_grad_()
    distance.calibrate(pixels)
    function = pair_loss(loss, distance, CLASSES, WIDTH)
    value = function(pixels, LABELS)
    value.backward()
    assert value.isfinite() and value > 0 and pixels.grad.isfinite().all()
    # Every dimension of the mean and every dimension of the log-variance, not one of them by chance.
    assert (pixels.grad.abs().sum(0) > 0).all()


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@ALL
def test_library_loss_draws_classes_together_and_apart(name, loss):
    """Clouds that are far apart cost less than the same pixels with their labels dealt out at random."""
    distance = GaussianDistance(name)
    pixels = embedding()
    pixels[:, :WIDTH] += 4 * torch.eye(CLASSES, WIDTH)[LABELS]
    distance.calibrate(pixels)
    torch.manual_seed(0)
    function = pair_loss(loss, distance, CLASSES, WIDTH)
    if loss == "proxy_anchor":
        centres = torch.stack([pixels[LABELS == c].mean(0) for c in range(CLASSES)])
        function.proxies.data.copy_(centres)
    dealt = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(2))]
    assert function(pixels, LABELS) < function(pixels, dealt)


@ALL
def test_closer_pair_has_the_larger_value_if_and_only_if_it_is_a_similarity(name):
    distance = GaussianDistance(name)
    assert distance.is_inverted == (name == "mutual_likelihood")
    query, near, far = torch.zeros(3, 1, 2 * WIDTH)
    near[:, :WIDTH], far[:, :WIDTH] = 0.5, 3.0
    values = distance(query, torch.cat([near, far]))[0]
    assert (values[0] > values[1]) == distance.is_inverted
    assert distance.smallest_dist(values) == values[0]


@ALL
def test_calibration_brings_the_typical_pair_and_the_pixel_itself_to_what_the_losses_were_made_for(name):
    distance, pixels = GaussianDistance(name), embedding()
    assert not distance.calibrated
    distance.calibrate(pixels)
    assert distance.calibrated
    values = distance(pixels)
    own = torch.eye(len(pixels), dtype=torch.bool)
    typical = 0.0 if distance.is_inverted else 1.0
    assert float(values[~own].median()) == pytest.approx(typical, abs=CALIBRATED)
    if distance.is_inverted:
        assert float(values[own].median()) == pytest.approx(1.0, abs=CALIBRATED)


@ALL
def test_calibration_of_pixels_that_are_all_alike_leaves_finite_values(name):
    distance, pixels = GaussianDistance(name), embedding()[:1].repeat(4, 1)
    distance.calibrate(pixels)
    assert distance(pixels).isfinite().all() and distance.scale > 0


@ALL
def test_calibration_travels_in_the_state_dict(name):
    distance, pixels = GaussianDistance(name), embedding()
    distance.calibrate(pixels)
    fresh = GaussianDistance(name)
    assert not torch.equal(fresh(pixels), distance(pixels))
    fresh.load_state_dict(distance.state_dict())
    assert set(distance.state_dict()) == {"offset", "scale", "calibrated"}
    assert fresh.calibrated and torch.equal(fresh(pixels), distance(pixels))


@ALL
def test_pairwise_distance_is_the_diagonal_of_all_pairs(name):
    distance = GaussianDistance(name).double()
    one, other = embedding(torch.float64), embedding(torch.float64).flip(0)
    distance.calibrate(one)
    expected = distance.compute_mat(one, other).diagonal()
    torch.testing.assert_close(distance.pairwise_distance(one, other), expected, rtol=EXACT, atol=EXACT)


def test_embedding_is_mean_then_log_variance_and_stray_log_variances_are_clamped():
    mean, variance = split_embedding(torch.tensor([[1.0, 2.0, 0.0, 50.0], [3.0, 4.0, -50.0, 1.0]]))
    assert mean.tolist() == [[1, 2], [3, 4]]
    expected = torch.tensor([[0.0, 3.0], [-6.0, 1.0]]).exp()
    torch.testing.assert_close(variance, expected)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@ALL
def test_a_distance_used_alone_says_once_that_it_is_not_calibrated(name, caplog):
    distance, pixels = GaussianDistance(name), embedding()
    distance(pixels), distance(pixels)
    (warning,) = warnings_of(caplog)
    assert f"GaussianDistance('{name}') is not calibrated" in warning and "call calibrate(embedding)" in warning
    # What it says is true: the values are the metric's own.
    assert torch.equal(distance(pixels), distance.raw(pixels, pixels))


@ALL
def test_a_calibrated_distance_and_the_objective_say_nothing(name, caplog):
    distance, pixels = GaussianDistance(name), embedding()
    distance.calibrate(pixels)
    distance(pixels)
    Objective(name, "multi_similarity", 0.1, 10.0, 16, CLASSES, WIDTH)(pixels, LABELS, torch.arange(len(LABELS)))
    assert warnings_of(caplog) == []


@ALL
def test_class_probabilities_are_not_calibrated_as_probabilities(name):
    """The labels are noise, so calibrated ones would be near to a third; the classes' own pixels get far more."""
    distance, pixels = GaussianDistance(name), 0.3 * embedding()
    classes = ClassDistributions(CLASSES, WIDTH, temperature=10.0)
    distance.calibrate(pixels)
    classes.place(pixels, LABELS)
    dealt = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(2))]
    probabilities = classes(pixels, distance).exp()
    confidence, right = probabilities.max(1).values.mean(), (probabilities.argmax(1) == dealt).float().mean()
    assert confidence - right > 0.2
