"""A whole run on the digits: warm-up, schedule, the choices of an epoch, what a step that is not finite leaves."""

import math

import pytest
import torch

from idml import evaluate, train
from idml.data import ClassSubset, evaluation_batches, held_out_classes, training_images
from idml.module import decay
from idml.scoring import Embedded, chance_level, embed, recall_at_1
from idml.selection import EpochSelection
from idml.sets import load_retrieval_set
from idml.tests.small import BATCHES_AN_EPOCH, INTROSPECTIVE, small_config
from idml.uncertainty import auroc, blurred, certain_half, occluded, partners_of_another_class, uncertainty_scores

HELD_OUT = ["data.held_out=0.4", "selection=held-out"]


def embedded_by(cfg, network, images) -> Embedded:
    """Return the embeddings of a set's images on the CPU."""
    return embed(network, evaluation_batches(cfg, images), torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run of two epochs with everything on, its config, folder and metrics."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    cfg = small_config(folder, *INTROSPECTIVE, *HELD_OUT, epochs=2)
    return cfg, folder, train.run(cfg, folder)


def test_a_run_gives_every_choice_of_an_epoch_and_what_the_uncertainty_measures(whole):
    _, folder, metrics = whole
    names = ["recall_at_1", "recall_at_8", "r_precision", "map_at_r", "nmi", "f1"]
    for name in names:
        assert metrics[name] == metrics[f"{name}_held_out"] and 0 < metrics[name] <= 1
        assert {f"{name}_last", f"{name}_best_test"} <= set(metrics)
    assert metrics["recall_at_1_best_test"] >= max(metrics["recall_at_1_last"], metrics["recall_at_1"])
    assert {metrics["epoch_best_test"], metrics["epoch_held_out"]} <= {1.0, 2.0}
    assert all(0 <= metrics[f"auroc_{name}"] <= 1 for name in ("mixed", "occluded", "blurred"))
    halves = metrics["recall_at_1_certain_half"], metrics["recall_at_1_uncertain_half"]
    assert sum(halves) / 2 == pytest.approx(metrics["recall_at_1"], abs=2e-3)  # halves of 896 images
    assert metrics["recall_at_1_chance"] == pytest.approx(0.2, abs=0.01)
    assert metrics["n_test"] == 896 and metrics["skipped_steps"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"uncertainty.png", "extremes.png"}


def test_a_checkpoint_gives_the_scores_of_its_run(whole, tmp_path):
    cfg, folder, metrics = whole
    again = evaluate.evaluate_checkpoint(cfg, folder / "held-out.ckpt", tmp_path)
    for name in ("recall_at_1", "map_at_r", "nmi", "auroc_mixed", "n_test"):
        assert again[name] == pytest.approx(metrics[name], abs=1e-9), name
    assert again["steps_trained"] == metrics["epoch_held_out"] * 16  # of 32 images of three classes


def test_the_cost_is_estimated(tmp_path):
    assert 0 < train.seconds_of_run(small_config(tmp_path, *INTROSPECTIVE)) < math.inf


def test_classes_that_train_choose_and_test_are_disjoint(tmp_path):
    cfg = small_config(tmp_path, *HELD_OUT)
    trained, held_out = training_images(cfg)
    test = load_retrieval_set("digits", "test", None)
    names = [set(images.classes) for images in (trained, held_out, test)]
    assert [len(one) for one in names] == [3, 2, 5] and len(set.union(*names)) == 10
    for images in (trained, held_out):
        assert sorted(set(images.labels.tolist())) == list(range(len(images.classes)))
    whole = load_retrieval_set("digits", "train", None)
    part = ClassSubset(whole, [3, 1])
    assert part.classes == ("1", "3") and part.image(0).equal(whole.image(int(part.positions[0])))
    assert (whole.labels[part.positions] == [[1, 3][label] for label in part.labels]).all()
    assert held_out_classes(100, 0.2) == held_out_classes(100, 0.2) and len(held_out_classes(100, 0.2)) == 20


def test_warm_up_trains_the_heads_and_proxies_alone_and_the_rest_follows(tmp_path):
    cfg = small_config(tmp_path, *INTROSPECTIVE, "optim.warmup_epochs=1", epochs=2)
    module, data, sets = train.prepare(cfg)
    first = {name: value.clone() for name, value in module.named_parameters()}
    seen = []

    class Watch(train.pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx in (BATCHES_AN_EPOCH - 1, 2 * BATCHES_AN_EPOCH - 1):
                seen.append({name for name, value in module.named_parameters() if value.equal(first[name])})
                state = module.trainer.optimizers[0].state
                seen.append({int(state[p]["step"]) for p in module.model.backbone_parameters() if p in state})

    train.fit(cfg, module, data, tmp_path, [Watch()])
    backbone = {name for name in first if name.startswith("model.backbone")}
    assert seen == [backbone, set(), set(), {BATCHES_AN_EPOCH}]


def test_rates_fall_at_the_milestones_and_proxies_have_their_own(tmp_path):
    cfg = small_config(tmp_path, "optim.milestones=[1]", "optim.gamma=0.5", epochs=2)
    module, data, _ = train.prepare(cfg)
    seen = []

    class Watch(train.pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    train.fit(cfg, module, data, tmp_path, [Watch()])
    lr = cfg.optim.lr
    assert seen[:BATCHES_AN_EPOCH] == [[lr, lr, 100 * lr]] * BATCHES_AN_EPOCH
    assert seen[BATCHES_AN_EPOCH:] == [[lr / 2, lr / 2, 50 * lr]] * BATCHES_AN_EPOCH
    assert decay(7.5, cfg.optim) == 0.5 and decay(0.99, cfg.optim) == 1


def test_gradients_are_clipped_by_value(tmp_path):
    cfg = small_config(tmp_path, "optim.clip_value=1e-4")
    module, data, _ = train.prepare(cfg)
    largest = []

    class Watch(train.pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                largest.append(max(float(gradient.abs().max()) for gradient in gradients))

    train.fit(cfg, module, data, tmp_path, [Watch()])
    assert largest and max(largest) == pytest.approx(1e-4)


def test_step_that_is_not_finite_changes_neither_weights_nor_statistics_nor_optimiser(tmp_path):
    cfg = small_config(tmp_path, *INTROSPECTIVE)
    module, data, _ = train.prepare(cfg)
    states = []

    class Poison(train.pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                batch["images"].fill_(torch.inf)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx < 4:
                state = trainer.optimizers[0].state.values()
                moments = [value.clone() for one in state for value in one.values()]
                states.append([*(value.clone() for value in module.state_dict().values()), *moments])

    train.fit(cfg, module, data, tmp_path, [Poison()])
    _, before, after, following = states
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and module.skipped_steps == 1
    assert not all(torch.equal(a, b) for a, b in zip(after, following, strict=True))


def test_the_best_epoch_is_the_first_of_equals_and_its_weights_are_kept(tmp_path):
    cfg = small_config(tmp_path, epochs=3)
    module, data, sets = train.prepare(cfg)
    selection = EpochSelection(cfg, tmp_path, sets, module.steps_per_epoch)
    train.fit(cfg, module, data, tmp_path, [selection])
    curve = selection.curves["best-test-epoch"]
    assert len(curve) == 3 and selection.best_epoch("best-test-epoch") == 1 + curve.index(max(curve))
    state, steps = train.read_checkpoint(selection.path("best-test-epoch"))
    assert steps == selection.best_epoch("best-test-epoch") * BATCHES_AN_EPOCH
    module.model.load_state_dict(state)
    assert recall_at_1(embedded_by(cfg, module.model, sets["best-test-epoch"])) == max(curve)


def test_scores_are_of_the_semantic_half_alone(tmp_path):
    cfg = small_config(tmp_path, *INTROSPECTIVE)
    module, _, sets = train.prepare(cfg)
    test = sets["best-test-epoch"]
    before = embedded_by(cfg, module.model, test)
    with torch.no_grad():
        module.model.uncertainty.weight.mul_(100)
    after = embedded_by(cfg, module.model, test)
    assert after.semantic.equal(before.semantic) and not after.uncertainty.equal(before.uncertainty)
    torch.testing.assert_close(before.semantic.norm(dim=1), torch.ones(len(test)))


def test_an_uncertainty_that_is_the_semantic_embedding_ranks_as_its_length(tmp_path):
    cfg = small_config(tmp_path, *INTROSPECTIVE)
    module, _, sets = train.prepare(cfg)
    module.model.uncertainty.load_state_dict(module.model.semantic.state_dict())
    embedded = embedded_by(cfg, module.model, sets["best-test-epoch"])
    assert embedded.length.equal(embedded.uncertainty) and embedded.length.std() > 0
    assert uncertainty_scores(embedded, {})["uncertainty_length_correlation"] == pytest.approx(1)
    embedded.length = -embedded.length
    assert uncertainty_scores(embedded, {})["uncertainty_length_correlation"] == pytest.approx(-1)


def test_chance_level_is_the_share_of_pairs_of_one_class():
    labels = torch.tensor([0, 0, 1, 1, 1])
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    assert chance_level(labels) == sum(bool(labels[a] == labels[b]) for a, b in pairs) / len(pairs)


def test_recall_at_1_counts_nearest_images_of_the_own_class():
    angles = torch.tensor([0.0, 0.1, 1.0, 1.05, 2.0])
    embedded = Embedded(
        torch.stack([angles.cos(), angles.sin()], 1), torch.ones(5), torch.zeros(5), torch.tensor([0, 0, 1, 0, 1])
    )
    assert recall_at_1(embedded) == 2 / 5


def test_ambiguous_images_are_what_they_are_said_to_be(tmp_path):
    images = torch.rand(2, 3, 16, 16) + 1
    hidden = occluded(images, [4, 9])
    grey = (hidden == 0).all(1)
    assert grey.sum((1, 2)).tolist() == [64, 64] and not grey[0].equal(grey[1])
    assert hidden[~grey[:, None].expand_as(hidden)].equal(images[~grey[:, None].expand_as(images)])
    soft = blurred(images)
    assert soft.shape == images.shape and soft.var() < 0.5 * images.var()
    labels = load_retrieval_set("digits", "test", None).labels
    partner = partners_of_another_class(labels)
    assert (labels[partner] != labels).all() and (partner == partners_of_another_class(labels)).all()


def test_detectors_and_halves():
    clean, changed = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0, 5.0])
    assert auroc(clean, changed) == pytest.approx(8 / 9)
    assert certain_half(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])).tolist() == [False, True, True, False, False]


def test_evaluation_batches_hold_every_image_once(tmp_path):
    cfg = small_config(tmp_path, "output.batch_size=100")
    test = load_retrieval_set("digits", "test", None)
    indices = torch.cat([batch["indices"] for batch in evaluation_batches(cfg, test)])
    assert indices.tolist() == list(range(len(test)))
