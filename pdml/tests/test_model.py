"""The models of the configs: they build, give the shapes that the read-outs need, and start from equal weights."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pdml.inference import predict_scene
from pdml.model import CrossEntropy, PrincipalComponents, Probabilistic, Published, build_model, feature_count
from pdml.normal import keyed_normal
from pdml.train import prepare
from shared.claims.compose import compose
from shared.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
SINGLE = 1e-4  # the projection is stored and applied in float32; components are of order one
EXACT = 1e-12  # float64, the same sums
DENSE = ("ssrn", "hybridsn", "ssftt")
PAIRED = [(model, method) for model in DENSE for method in ("plain", "every-pixel", "pdml")]
ALL = [*PAIRED, ("ssrn-published", "published")]
CLASS = {"plain": CrossEntropy, "every-pixel": CrossEntropy, "pdml": Probabilistic, "published": Published}
BANDS, CLASSES, P = 32, 5, 9


def built(model: str, method: str):
    torch.manual_seed(0)
    network = build_model(compose("pdml", [f"model={model}", f"method={method}"]), BANDS, CLASSES)
    network.spectral.weight.normal_(std=BANDS**-0.5)
    return network


def patches(count: int) -> torch.Tensor:
    return torch.randn(count, BANDS, P, P, generator=torch.Generator().manual_seed(1))


def test_the_pairs_tested_here_hold_every_model_and_method_config():
    stems = [{path.stem for path in (CONFIGS / group).glob("*")} for group in ("model", "method")]
    # The support vector machine has no network; test_svm.py holds it.
    assert stems == [{model for model, _ in ALL} | {"none"}, {method for _, method in ALL} | {"svm"}]


@pytest.mark.parametrize("model, method", ALL)
@torch.no_grad()
def test_config_builds_and_gives_the_documented_shapes(model, method):
    net = built(model, method).eval()
    assert type(net) is CLASS[method] and (net.patch_size, net.bands, net.num_classes) == (P, BANDS, CLASSES)
    assert net.width == (32 if method == "pdml" else CLASSES) and net.dense == (method != "published")
    centre = net.encode_centre(patches(3))
    assert [x.shape for x in centre] == [(3, net.width)] * 2
    if net.dense:
        whole = net.encode(patches(3))
        assert [x.shape for x in whole] == [(3, net.width, P, P)] * 2
        assert all(torch.equal(c, w[:, :, P // 2, P // 2]) for c, w in zip(centre, whole, strict=True))
        assert [x.shape for x in net.encode_scene(torch.randn(1, BANDS, 11, 12))] == [(1, net.width, 11, 12)] * 2
    mean, variance = centre[0], centre[1].exp()
    decision, uncertainty = net.decide(mean, variance), net.uncertainty(mean, variance)
    assert decision.shape == (3, CLASSES) and uncertainty.shape == (3,) and (uncertainty > 0).all()
    torch.testing.assert_close(decision.exp().sum(1), torch.ones(3))


@pytest.mark.parametrize("model, method", ALL)
def test_rows_of_the_loss_are_the_pixels_that_the_method_trains_on(model, method):
    net = built(model, method)
    labels = torch.randint(0, CLASSES + 1, (4, P, P), generator=torch.Generator().manual_seed(2))
    labels[:, P // 2, P // 2] = torch.tensor([1, 2, 3, 4])
    rows, chosen = net.rows(patches(4), labels)
    assert chosen.dtype == torch.bool and chosen.shape == labels.shape and len(rows) == chosen.sum()
    if method in ("plain", "published"):
        assert labels[chosen].tolist() == [1, 2, 3, 4]
    else:
        assert torch.equal(chosen, labels > 0)
    loss = net.loss(rows, labels[chosen] - 1, torch.arange(len(rows)))
    assert loss.shape == () and loss.isfinite()


@pytest.mark.parametrize("model", DENSE)
@torch.no_grad()
def test_a_row_of_the_loss_is_what_encode_gives_that_pixel(model):
    net = built(model, "pdml").double().eval()
    labels = torch.zeros(2, P, P, dtype=torch.int64)
    labels[0, 1, 7], labels[1, 8, 2] = 3, 1
    rows, _ = net.rows(patches(2).double(), labels)
    mean, log_variance = net.encode(patches(2).double())
    expected = [torch.cat([mean[b, :, r, c], log_variance[b, :, r, c]]) for b, r, c in ((0, 1, 7), (1, 8, 2))]
    torch.testing.assert_close(rows, torch.stack(expected), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("model", DENSE)
def test_methods_share_the_initial_weights_of_the_backbone_for_a_seed(model):
    def start(method: str, seed: int) -> dict:
        net = prepare(compose("pdml", [f"model={model}", f"method={method}", f"seed={seed}"]))[2].model
        return {name: x for name, x in net.state_dict().items() if name.startswith(("backbone", "spectral"))}

    plain, other_seed = start("plain", 0), start("plain", 1)
    for method in ("pdml", "every-pixel"):
        actual = start(method, 0)
        assert actual.keys() == plain.keys() and all(torch.equal(actual[name], plain[name]) for name in plain)
    assert any(not torch.equal(other_seed[n], plain[n]) for n in plain if n.startswith("backbone"))


def test_components_are_those_of_sklearn_on_training_pixels_scaled_by_the_first():
    scene, split, module, _ = prepare(compose("pdml", ["seed=3"]))
    pipeline = make_pipeline(StandardScaler(), PCA(30, svd_solver="full"))
    train = pipeline.fit_transform(scene.cube[split.train].astype(np.float64))
    patch = scene.cube[10:19, 20:29]
    scale = train[:, 0].std(ddof=1)
    expected = pipeline.transform(patch.reshape(81, -1).astype(np.float64)).reshape(9, 9, 30) / scale
    actual = module.model.spectral(torch.from_numpy(patch).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=SINGLE)
    # Unwhitened: the spread of the components falls off as in the data.
    assert train.std(0)[-1] < 0.5 * train.std(0)[0]


def test_components_of_a_constant_band_are_finite():
    spectra = keyed_normal(5, np.arange(120)).reshape(20, 6)
    spectra[:, 2] = 4.0
    components = PrincipalComponents(6, 3)
    components.fit(spectra)
    values = components(torch.from_numpy(spectra.astype(np.float32))[:, :, None, None])
    assert values.shape == (20, 3, 1, 1) and values.isfinite().all() and values.abs().max() < 10


@pytest.mark.parametrize("pixels, bands", [(4, 12), (12, 4)])
def test_more_components_than_training_pixels_or_bands_are_refused(pixels, bands):
    with pytest.raises(UserError, match=f"5 principal components .* are {pixels} and {bands}: lower 'components'"):
        PrincipalComponents(bands, 5).fit(np.ones((pixels, bands)))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["patch_size=8"], "patch_size 8 is even"),
        (["+model.backbone.depth=3"], "depth"),
        (["+method.model.depth=3"], "depth"),
        (["method=plain", "+method.model.depth=3"], "depth"),
        (["method.model.metric=euclid"], "euclid"),
        (["method.model.loss=arc"], "arc"),
        (["components=3"], "raise them to"),
    ],
)
def test_what_a_model_cannot_be_built_from_is_named(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        build_model(compose("pdml", overrides), BANDS, CLASSES)


@pytest.mark.parametrize(
    ("model", "method"), [("ssrn-published", "pdml"), ("ssrn-published", "plain"), ("hybridsn", "published")]
)
def test_a_method_that_cannot_read_the_backbone_is_refused(model, method):
    cfg = compose("pdml", [f"model={model}", f"method={method}"])
    with pytest.raises(UserError, match="does not fit"):
        build_model(cfg, bands=40, classes=4)


def test_the_defaults_of_the_class_are_the_values_of_its_config():
    given = {n: p.default for n, p in inspect.signature(Probabilistic).parameters.items() if p.default is not p.empty}
    cfg = compose("pdml", [])
    assert given == {"patch_size": cfg.patch_size} | {k: v for k, v in cfg.method.model.items() if k != "_target_"}


def test_the_readmes_lines_put_a_users_own_backbone_into_pdml():
    text = (CONFIGS.parent / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "Probabilistic(" in block]
    assert sum(bool(line.strip()) and not line.startswith(("import", "from")) for line in code.splitlines()) == 5
    torch.manual_seed(0)
    spectra = keyed_normal(6, np.arange(120)[:, None], np.arange(103)[None]).astype(np.float32)  # (n, bands)
    names = {"spectra": spectra, "patches": torch.randn(4, 103, 9, 9), "labels": torch.randint(0, 10, (4, 9, 9))}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (the page's own lines)
    model, loss = names["model"], names["loss"]
    assert loss.isfinite() and all(p.grad is None for p in model.parameters())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    cube = keyed_normal(7, np.arange(13 * 12 * 103)).reshape(13, 12, 103).astype(np.float32)
    fused = predict_scene(model.eval(), cube, 64).fused
    assert fused.prediction.shape == (13, 12) and fused.prediction.max() < 9


def test_the_features_of_a_backbone_are_counted_without_changing_it():
    backbone = nn.Sequential(nn.Conv2d(6, 17, 3, padding=1), nn.BatchNorm2d(17), nn.Dropout(0.5))
    state, before = torch.get_rng_state(), {name: x.clone() for name, x in backbone.state_dict().items()}
    assert feature_count(backbone, 6, 5) == 17 and backbone.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(150, 8))])
def test_a_backbone_that_loses_pixels_is_refused(layer):
    with pytest.raises(UserError, match=r"the backbone turns \(1, 6, 5, 5\) into .* a feature for every pixel"):
        Probabilistic(PrincipalComponents(6, 6), layer, 5, classes=3)
