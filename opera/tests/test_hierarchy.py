"""The objective of OPERA, held to a step that the release computed, and what the arrangements promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from opera.hierarchy import ARRANGEMENTS, UNLABELLED, Hierarchy, conflict, cross_entropy, info_nce, supervised_contrast
from shared.errors import UserError

GOLDEN = 1e-9  # relative, float64
HEADS = {
    "dim": 8,
    "hidden": 20,
    "projector_layers": 2,
    "predictor_layers": 2,
    "predictor_norm": False,
    "class_hidden": 8,
    "class_layers": 2,
}


class Body(nn.Module):
    """One linear map with a ReLU: the backbone of the golden step."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(10, 12)

    def forward(self, x):
        return self.body(x).relu()


def small(arrangement: str, seed: int = 0, **options) -> Hierarchy:
    torch.manual_seed(seed)
    options = {"temperature": 0.5} | options
    return Hierarchy(Body(), 6, HEADS, arrangement, **options).double()


@pytest.fixture(scope="module")
def arrays():
    with np.load(Path(__file__).parent / "golden/opera_objective.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


# Our names of the release's modules.
PLACES = {
    "base_encoder.body": "online.backbone.body",
    "base_encoder.fc": "online.projector",
    "momentum_encoder.body": "momentum.backbone.body",
    "momentum_encoder.fc": "momentum.projector",
    "fully_projector": "class_head",
}


def place(name: str) -> str:
    for theirs, ours in PLACES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def given(arrays, prefix: str) -> dict[str, torch.Tensor]:
    return {place(name[len(prefix) :]): value for name, value in arrays.items() if name.startswith(prefix)}


def test_the_released_step_is_the_golden_one(arrays):
    hierarchy = small("hierarchy", temperature=float(arrays["in_temperature"])).train()
    hierarchy.load_state_dict(given(arrays, "param_"))
    hierarchy.update_momentum(float(arrays["in_momentum"]))
    terms = hierarchy(arrays["in_x1"], arrays["in_x2"], arrays["in_labels"])
    terms.total.backward()
    close = {"rtol": GOLDEN, "atol": 1e-12}
    torch.testing.assert_close(terms.total.detach(), arrays["out_loss"], **close)
    both = 2 * float(arrays["in_temperature"]) * terms.instance.detach()
    torch.testing.assert_close(both, arrays["out_contrastive"], **close)
    torch.testing.assert_close(terms.classes.detach(), arrays["out_ce1"] + arrays["out_ce2"], **close)
    gradients, actual = given(arrays, "gradparam_"), dict(hierarchy.named_parameters())
    assert set(gradients) == {name for name, p in actual.items() if p.requires_grad}
    for name, expected in gradients.items():
        torch.testing.assert_close(actual[name].grad, expected, msg=name, **close)
    state = hierarchy.state_dict()
    for name, expected in given(arrays, "after_").items():
        torch.testing.assert_close(state[name], expected, msg=name, **close)


def batch(size: int = 16):
    draw = torch.Generator().manual_seed(1)
    first, second = (torch.randn(size, 10, generator=draw, dtype=torch.float64) for _ in range(2))
    return first, second, torch.arange(size) % 6


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_parameter_that_trains_gets_gradient_and_the_momentum_encoder_none(arrangement):
    hierarchy = small(arrangement).train()
    hierarchy(*batch()).total.backward()
    for name, parameter in hierarchy.named_parameters():
        if name.startswith("momentum"):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


def reached(hierarchy: Hierarchy, term: str) -> set[str]:
    getattr(hierarchy(*batch()), term).backward()
    parts = {
        name.split(".")[0] if "online" not in name else name.split(".")[1]: p
        for name, p in hierarchy.named_parameters()
    }
    return {part for part, p in parts.items() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    "arrangement, spaces",
    [
        ("one-space", {"backbone", "projector", "predictor", "class_head"}),
        ("backbone", {"backbone", "class_head"}),
        ("parallel", {"backbone", "projector", "class_head"}),
        ("hierarchy", {"backbone", "projector", "predictor", "class_head"}),
    ],
)
def test_the_classes_train_what_lies_below_their_space(arrangement, spaces):
    assert reached(small(arrangement).train(), "classes") == spaces
    assert reached(small(arrangement).train(), "instance") == {"backbone", "projector", "predictor"}


def test_one_space_has_its_proxies_where_the_keys_are_and_the_hierarchy_above_them():
    one_space, hierarchy = small("one-space"), small("hierarchy")
    assert isinstance(one_space.class_head, nn.Linear) and one_space.class_head.in_features == HEADS["dim"]
    assert [type(part) for part in hierarchy.class_head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_printed_weights_are_all_one():
    first, second, labels = batch()
    terms = small("hierarchy", loss_weights="printed")(first, second, labels)
    torch.testing.assert_close(terms.total, terms.instance + terms.classes)
    released = small("hierarchy")(first, second, labels)
    torch.testing.assert_close(released.total, 0.5 * released.instance + 0.5 * released.classes)  # T = 1/2
    alone = small("instance", temperature=0.2)(first, second, labels)
    torch.testing.assert_close(alone.total, 2 * 0.2 * alone.instance)  # MoCo-v3's own


def test_queries_find_their_own_key_among_the_batch():
    keys = torch.randn(5, 3, dtype=torch.float64)
    queries = torch.randn(5, 3, dtype=torch.float64)
    similarity = torch.cosine_similarity(queries[:, None], keys[None], dim=2) / 0.2
    expected = torch.stack([-similarity[i].log_softmax(0)[i] for i in range(5)]).mean()
    torch.testing.assert_close(info_nce(queries, keys, 0.2), expected)
    torch.testing.assert_close(info_nce(7 * queries, 3 * keys, 0.2), expected)


def test_images_without_a_label_count_in_the_instances_alone():
    first, second, labels = batch()
    some = labels.clone()
    some[3:] = UNLABELLED
    hierarchy = small("hierarchy").eval()
    whole, part = hierarchy(first, second, labels), hierarchy(first, second, some)
    torch.testing.assert_close(part.instance, whole.instance)
    logits = [hierarchy.logits(view) for view in hierarchy.spaces(first, second)]
    expected = sum(nn.functional.cross_entropy(rows[:3], labels[:3]) for rows in logits)
    torch.testing.assert_close(part.classes, expected)
    none = torch.full_like(labels, UNLABELLED)
    loss = cross_entropy(logits[0], none)
    assert loss == 0 and torch.autograd.grad(loss, logits[0])[0].eq(0).all()


def test_the_conflict_is_the_cosine_of_the_two_objectives_gradients():
    hierarchy = small("parallel").train()
    first, second, labels = batch()
    actual = conflict(hierarchy, first, second, labels)
    y = [view["y"] for view in hierarchy.spaces(first, second)]
    instance, classes = hierarchy.terms(
        [{"y": one, "z": (z := hierarchy.online.projector(one)), "q": hierarchy.predictor(z)} for one in y],
        first,
        second,
        labels,
    )
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(t, y, retain_graph=True)]) for t in (instance, classes))
    assert actual == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-9) and -1 <= actual <= 1
    with pytest.raises(UserError, match="has one objective alone"):
        conflict(small("instance"), first, second, labels)


def test_views_share_one_pass_on_a_gpu_where_no_batch_statistics_tell_them_apart(monkeypatch):
    hierarchy = small("hierarchy").train()
    calls = []
    hierarchy.online.backbone.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    apart = hierarchy(*batch())
    assert calls == [16, 16]
    monkeypatch.setattr("opera.hierarchy.launches_are_dear", lambda device: True)
    together = hierarchy(*batch())
    assert calls == [16, 16, 32]
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)
    normed = small("hierarchy")
    normed.online.backbone.norm = nn.BatchNorm1d(12)
    normed.online.backbone.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    normed.train()(*batch())
    assert calls == [16, 16, 32, 16, 16]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"arrangement": "omni"}, "objective.arrangement=omni is unknown: choose one of one-space"),
        ({"loss_weights": "equal"}, "objective.loss_weights=equal is unknown: choose one of released, printed"),
        ({"denominator": "none"}, "objective.denominator=none is unknown: choose one of all, others"),
        ({"temperature": 0.0}, "temperature=0.0: set it above 0"),
        ({"classes": 0}, "arrangement=hierarchy needs labels of two classes"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(arguments, words):
    options = {"classes": 6, "arrangement": "hierarchy", "temperature": 0.5} | arguments
    with pytest.raises(UserError, match=words) as error:
        Hierarchy(Body(), heads=HEADS, **options)
    assert "\n" not in str(error.value)


def test_the_printed_softmax_leaves_the_true_one_out_of_the_denominator():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, UNLABELLED, 1, 1])
    expected = [
        torch.logsumexp(torch.cat([row[:label], row[label + 1 :]]), 0) - row[label]
        for row, label in zip(logits, labels.tolist(), strict=True)
        if label >= 0
    ]
    torch.testing.assert_close(cross_entropy(logits, labels, True), torch.stack(expected).mean())
    queries, keys = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert float(info_nce(queries, keys, 0.5, True)) == pytest.approx(np.log(2) - 2)
    assert float(info_nce(queries, keys, 0.5)) == pytest.approx(np.log(np.exp(2) + 2) - 2)


def test_the_supervised_contrast_is_the_mean_over_the_others_of_a_class_and_over_the_other_view_without_one():
    torch.manual_seed(0)
    views = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    labels = torch.tensor([0, 1, 0, UNLABELLED])
    rows = torch.nn.functional.normalize(torch.cat(views), dim=1)
    alike = torch.tensor([0, 1, 0, 7, 0, 1, 0, 7])
    losses = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        similarity = rows[i] @ rows.T / 0.1
        below = torch.logsumexp(similarity[others], 0)
        losses.append(torch.stack([below - similarity[j] for j in others if alike[j] == alike[i]]).mean())
    actual = supervised_contrast(views, labels, 0.1)
    torch.testing.assert_close(actual, torch.stack(losses).mean(), rtol=1e-9, atol=0)
