"""The metric on logits: against the formula in two plain loops, its gradient, what it does where it is delicate."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from idml.backbones import ConvNetTiny, ResNetSmall, build_backbone
from idml.classifier import ClassificationNetwork, IntrospectiveClassifier, introspective_logits
from idml.pyramidnet import pyramidnet
from shared.errors import UserError

B, C, FEATURES, U, TAU = 6, 5, 9, 4, 5.0
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order
SAME = {"rtol": 0, "atol": 0}


def parts(dtype=torch.float64, scale: float = 1.0) -> list[torch.Tensor]:
    """Return features, weight, bias and uncertainty, the first and last positive and of order ``scale``."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(B, FEATURES), (C, FEATURES), (C,), (B, U)]
    f, W, b, u = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [part.to(dtype).requires_grad_() for part in (scale * f.abs(), W, b, scale * u.abs())]


@torch.no_grad()
def in_two_loops(f, W, b, u, tau, offset):
    classifier = nn.Linear(W.shape[1], W.shape[0]).to(W.dtype)
    classifier.weight.data, classifier.bias.data = W, b
    vectors = classifier(torch.eye(W.shape[1], dtype=W.dtype)).T  # (C, F), as the release obtains them
    actual = torch.empty(len(f), len(W), dtype=W.dtype)
    for i in range(len(f)):
        for c in range(len(W)):
            logit = classifier(f[i])[c]
            distance = sum((f[i, k] - vectors[c, k]) ** 2 for k in range(W.shape[1]))
            uncertainty = sum(u[i, k] ** 2 for k in range(u.shape[1]))
            actual[i, c] = 1 - (1 - logit) * math.exp(-(uncertainty + offset) / (tau * distance))
    return actual


@pytest.mark.parametrize("tau, offset", [(5.0, 0.0), (2.0, 4.0)])
def test_logits_are_those_of_the_formula_in_two_loops(tau, offset):
    expected = in_two_loops(*parts(), tau, offset)
    actual = introspective_logits(*parts(), tau, offset)
    torch.testing.assert_close(actual.detach(), expected, **DOUBLE)
    plain = F.linear(*parts()[:3]).detach()
    assert ((actual.detach() - plain).abs() > 1e-3).float().mean() > 0.9  # the metric does something


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_the_gradient_is_that_of_finite_differences(offset):
    assert torch.autograd.gradcheck(lambda *each: introspective_logits(*each, TAU, offset), parts())


def head(dtype=torch.float64) -> IntrospectiveClassifier:
    torch.manual_seed(0)
    return IntrospectiveClassifier(FEATURES, C, U, TAU).to(dtype)


def test_the_metric_acts_in_train_mode_alone():
    module, f = head(), parts()[0].detach()
    plain = F.linear(f, module.classifier.weight, module.classifier.bias)
    u = F.linear(f, module.uncertainty.weight, module.uncertainty.bias).clamp_min(0)
    expected = in_two_loops(f, module.classifier.weight, module.classifier.bias, u.detach(), TAU, 0.0)
    torch.testing.assert_close(module.eval()(f), plain, **SAME)
    torch.testing.assert_close(module.train()(f).detach(), expected, **DOUBLE)
    torch.testing.assert_close(module.uncertainty_of(f), u, **SAME)


def test_every_parameter_gets_gradient_in_train_mode_and_the_uncertainty_none_in_evaluation():
    for training in (True, False):
        module = head().train(training)
        F.cross_entropy(module(parts()[0].detach()), torch.arange(B) % C).backward()
        for name, parameter in module.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.any())
            assert reached == (training or name.startswith("classifier")), name


def test_without_uncertainty_the_logits_are_the_baselines():
    f, W, b, u = parts()
    actual = introspective_logits(f, W, b, torch.zeros_like(u), TAU, 0.0)
    torch.testing.assert_close(actual, F.linear(f, W, b), **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("certain", [True, False])
def test_a_feature_that_is_its_class_vector_gives_finite_logits_and_gradients(dtype, certain):
    _, W, b, u = parts(dtype)
    f = (W + b[:, None]).detach()[:3].requires_grad_()
    u = (torch.zeros(3, U) if certain else u.detach()[:3]).to(dtype).requires_grad_()
    actual = introspective_logits(f, W, b, u, TAU, 0.0)
    actual.sum().backward()
    assert actual.isfinite().all()
    assert all(part.grad.isfinite().all() for part in (f, W, b, u))
    if dtype is torch.float64 and not certain:
        torch.testing.assert_close(actual.diagonal(), torch.ones(3, dtype=dtype))  # the exponential is 0


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor that any operation returns has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        actual = function(*args, **(kwargs or {}))
        for each in actual if isinstance(actual, tuple | list) else (actual,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return actual


def test_no_tensor_of_batch_classes_and_features_is_made():
    batch, classes, features = 20, 30, 40
    module = IntrospectiveClassifier(features, classes, 8)
    f = torch.randn(batch, features, requires_grad=True)
    with LargestTensor() as largest:
        module(f).sum().backward()
    assert largest.numel == classes * features


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_metric_is_computed_in_float32(dtype):
    # Squared norms of these features exceed float16's largest number, 65,504.
    inputs = [part.detach() for part in parts(dtype, scale=300.0)]
    assert inputs[0].float().square().sum(1).min() > 65_504
    with torch.autocast("cpu", dtype):
        actual = introspective_logits(*inputs, TAU, 0.0)
    expected = introspective_logits(*(part.float() for part in inputs), TAU, 0.0)
    assert actual.dtype == torch.float32 and actual.isfinite().all()
    torch.testing.assert_close(actual, expected, **SAME)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_half_precision_head_trains(autocast):
    module = head(torch.float32 if autocast else torch.bfloat16).train()
    f = parts(torch.bfloat16, scale=30.0)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = module(f)
    F.cross_entropy(logits, torch.arange(B) % C).backward()
    for parameter in module.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("head_class", ["introspective", "linear"])
@pytest.mark.parametrize("body_class", ["maps", "features"])
def test_one_forward_gives_logits_and_the_baseline_is_plain_in_both_modes(body_class, head_class):
    torch.manual_seed(0)
    body = ConvNetTiny() if body_class == "maps" else pyramidnet(11, 12)
    classifier = (
        IntrospectiveClassifier(body.num_features, C, U)
        if head_class == "introspective"
        else nn.Linear(body.num_features, C)
    )
    network, images = ClassificationNetwork(body, classifier), torch.randn(B, 3, 8, 8)
    body.eval()
    features = body(images).mean((2, 3)) if body_class == "maps" else body.forward_features(images)
    assert features.shape == (B, body.num_features)
    linear = classifier.classifier if head_class == "introspective" else classifier
    torch.testing.assert_close(network.eval()(images), linear(features), **SAME)
    network.head.train()
    changed = not network(images).equal(linear(features))
    assert changed == (head_class == "introspective")


def test_every_parameter_of_the_network_gets_gradient():
    torch.manual_seed(0)
    body = ConvNetTiny()
    network = ClassificationNetwork(body, IntrospectiveClassifier(body.num_features, C, U)).train()
    F.cross_entropy(network(torch.randn(B, 3, 8, 8)), torch.arange(B) % C).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def starts_with_gradient(body: nn.Module, size: int, classes: int, uncertainty_dim: int) -> None:
    """Assert what the module's docstring says of an untrained network: nothing underflows, few rows are dead."""
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(16, 3, size // 8, size // 8), scale_factor=8, mode="bilinear")
    network = ClassificationNetwork(body, IntrospectiveClassifier(body.num_features, classes, uncertainty_dim))
    features = network.train().features(images).detach()
    logits, u = network.head(features), network.head.uncertainty_of(features)
    exponential = (1 - logits) / (1 - network.head.classifier(features))
    assert exponential.min() > 0.85
    F.cross_entropy(logits, torch.arange(16) % classes).backward()
    rows = network.head.uncertainty.weight.grad.abs().sum(1) > 0
    assert rows.equal((u > 0).any(0))  # a coordinate that is 0 for the whole batch has a row without gradient
    assert rows.float().mean() > 0.5


def test_an_untrained_network_starts_with_gradient_in_its_uncertainty():
    torch.manual_seed(0)
    starts_with_gradient(ResNetSmall(), 64, 100, 128)
    starts_with_gradient(pyramidnet(20, 48), 32, 100, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "pyramidnet200"])
def test_the_papers_networks_start_with_gradient_in_their_uncertainty(name):
    torch.manual_seed(0)
    if name == "resnet50":
        starts_with_gradient(build_backbone(name), 64, 1000, 512)
    else:
        starts_with_gradient(pyramidnet(), 32, 100, 128)


def test_an_uncertainty_that_is_too_large_leaves_no_gradient():
    f, W, b, u = parts(torch.float32)
    distances = torch.cdist(f, W + b[:, None]).square()
    u = (u.detach() / u.detach().norm(dim=1, keepdim=True)) * (104 * TAU * distances.max()).sqrt().detach()
    actual = introspective_logits(f, W, b, u.requires_grad_(), TAU, 0.0)
    actual[:, 0].sum().backward()
    torch.testing.assert_close(actual, torch.ones(B, C), **SAME)
    assert not u.grad.any()


@pytest.mark.parametrize("wrong", [{"uncertainty_dim": 0}, {"tau": 0.0}, {"tau": math.nan}, {"offset": -1.0}])
def test_constants_that_make_no_metric_are_one_sentence(wrong):
    with pytest.raises(UserError, match="metric.tau=") as raised:
        IntrospectiveClassifier(**({"features": FEATURES, "classes": C, "uncertainty_dim": U} | wrong))
    assert "\n" not in str(raised.value)
