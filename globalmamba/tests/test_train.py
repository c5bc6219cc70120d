"""The training step and what surrounds it: decay, schedule, average, steps that are not finite, scores, precision."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from shared.data.images import load_image_set
from shared.errors import UserError
from shared.training.checks import check_machine
from shared.training.config import hash_of

from .. import evaluate, train
from ..checks import check
from ..data import evaluation_batches, training_data
from ..module import learning_rate, parameter_groups
from ..receptive_field import draw_receptive_field, receptive_field
from .small import BATCHES_AN_EPOCH, small_config

EXACT = {"rtol": 0, "atol": 1e-7}  # one rounding of float32 numbers of order one


def trained(folder, *overrides, steps=4, callback=None):
    """Train a small run and return its module."""
    torch.set_num_threads(1)
    cfg = small_config(folder, *overrides, steps=steps)
    module, data = train.prepare(cfg)
    train.fit(cfg, module, data, folder, callbacks=[callback] if callback else [])
    return module


def test_vectors_and_what_the_network_excepts_are_not_decayed(tmp_path):
    module, _ = train.prepare(small_config(tmp_path))
    decayed, free = parameter_groups(module.model, 0.1)
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    free_names = {names[parameter] for parameter in free["params"]}
    assert {"pos_embed", "layers.0.mixer.A_log", "layers.0.mixer.D", "head.bias"} <= free_names
    assert {"cls_token"} & set(names.values()) <= free_names
    assert "norm_f.weight" in free_names and "head.weight" not in free_names
    assert module.model.no_weight_decay() <= free_names


def test_schedule_warms_up_on_a_line_and_ends_at_the_smallest_rate():
    rates = [learning_rate(step, 100, 10, lr=1.0, warmup_lr=0.1, min_lr=0.01) for step in range(101)]
    assert rates[0] == 0.1 and rates[5] == pytest.approx(0.55) and rates[10] == 1.0
    assert rates[55] == pytest.approx((1 + 0.01) / 2) and rates[100] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_rates_of_a_run_follow_the_schedule(tmp_path):
    cfg = small_config(tmp_path, "optim.warmup_epochs=0.05", steps=6)
    module, data = train.prepare(cfg)
    seen = []
    module.log_dict = lambda values, **_: seen.append(values["lr"])
    train.fit(cfg, module, data, tmp_path)
    assert module.warmup == round(0.05 * BATCHES_AN_EPOCH)
    o = cfg.optim
    expected = [learning_rate(i, 6, module.warmup, o.lr, o.warmup_lr, o.min_lr) for i in range(6)]
    assert seen == pytest.approx(expected)


def test_average_follows_the_weights_by_its_decay(tmp_path):
    module, data = train.prepare(small_config(tmp_path, "optim.ema_decay=0.75"))
    before = module.average.head.weight.clone()
    with torch.no_grad():
        module.model.head.weight.add_(1)
    module.update_average()
    torch.testing.assert_close(module.average.head.weight, before + 0.25, **EXACT)
    assert not any(parameter.requires_grad for parameter in module.average.parameters())
    assert not {id(p) for p in module.average.parameters()} & {
        id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]
    }


class Poison(train.pl.Callback):
    """Makes the loss of batch 2 infinite and keeps the module's state around it."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            batch["images"].fill_(torch.inf)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        rate = torch.tensor(optimizer.param_groups[0]["lr"])
        self.states.append([*(v.clone() for v in module.state_dict().values()), *moments, rate])


def test_step_that_is_not_finite_changes_neither_weights_nor_average_nor_optimiser_nor_rate(tmp_path):
    poison = Poison()
    module = trained(tmp_path, callback=poison)
    _, before, after, following = poison.states
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and module.skipped_steps == 1
    assert not all(torch.equal(a, b) for a, b in zip(after, following, strict=True))
    assert all(value.isfinite().all() for value in following)


def test_loss_without_mixing_is_the_smoothed_cross_entropy(tmp_path):
    module, data = train.prepare(small_config(tmp_path, "augment.smoothing=0.1"))
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        expected = F.cross_entropy(module.model(batch["images"]), batch["labels"], label_smoothing=0.1)
        torch.testing.assert_close(module.loss(batch, 0), expected)


def test_clipping_bounds_the_step(tmp_path):
    norms = []

    class Watch(train.pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            gradients = [p.grad for p in module.model.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    trained(tmp_path, "optim.clip_norm=0.01", callback=Watch())
    assert norms and max(norms) <= 0.01 * (1 + 1e-4)  # rounding of the norm in float32


def test_repeats_bring_views_of_the_same_images_into_a_batch(tmp_path):
    _, data = train.prepare(small_config(tmp_path, "augment.repeats=2", "augment.padding=1"))
    batch = next(iter(data.train_dataloader()))
    first, second = batch["indices"][::2], batch["indices"][1::2]
    assert torch.equal(first, second) and len(first.unique()) == 16
    assert not torch.equal(batch["images"][::2], batch["images"][1::2])


def test_training_subset_is_of_every_class_alike_and_drawn_by_the_seed(tmp_path):
    cfg = small_config(tmp_path, "data.train_images=100")
    data = training_data(cfg)
    labels = data.batches.images.labels[data.batches.chosen]
    assert torch.bincount(torch.from_numpy(labels)).tolist() == [10] * 10
    cfg.seed = 1
    assert training_data(cfg).batches.chosen.tolist() != data.batches.chosen.tolist()


class Fixed(nn.Module):
    """Gives the logits of a table, image after image."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.place = nn.Parameter(logits), 0

    def forward(self, images):
        self.place += len(images)
        return self.logits[self.place - len(images) : self.place]


def test_scores_are_those_of_all_test_images_whatever_the_batches(tmp_path):
    cfg = small_config(tmp_path, "output.batch_size=50")
    labels = torch.from_numpy(load_image_set("digits", "test", None).labels)
    logits = torch.randn(len(labels), 10, generator=torch.Generator().manual_seed(0))
    order = logits.argsort(1, descending=True)
    scores = evaluate.score(cfg, Fixed(logits), torch.device("cpu"))
    assert scores["n_test"] == len(labels) == evaluation_batches(cfg).samples
    assert scores["top1"] == pytest.approx(float((order[:, 0] == labels).double().mean()))
    assert scores["top5"] == pytest.approx(float((order[:, :5] == labels[:, None]).any(1).double().mean()))
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_diverged_has_no_score(tmp_path, value):
    cfg = small_config(tmp_path)
    logits = torch.zeros(evaluation_batches(cfg).samples, 10)
    logits[3] = value
    with pytest.raises(UserError, match="not finite: the training diverged, lower optim.lr"):
        evaluate.score(cfg, Fixed(logits), torch.device("cpu"))


def test_a_run_gives_its_metrics_and_the_cost_was_estimated(tmp_path):
    cfg = small_config(tmp_path, steps=2)
    assert 0 < train.seconds_of_run(cfg) < math.inf
    metrics = train.run(cfg, tmp_path)
    scores = {"top1", "top5", "loss", "n_test", "top1_average"}
    assert scores | {"images_per_second", "inference_memory", "parameters", "train_seconds"} <= set(metrics)
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 1 and metrics["skipped_steps"] == 0
    # A checkpoint gives the scores of its run, and a picture.
    again = evaluate.evaluate_checkpoint(cfg, tmp_path / "last.ckpt", tmp_path / "pictures")
    assert {key: again[key] for key in ("top1", "top5", "loss", "n_test")}.items() <= metrics.items()
    assert again["steps_trained"] == 2
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["receptive_field.png"]


class Patches(nn.Module):
    """Gives a grid whose middle token (1, 1) is the mean of a patch."""

    def forward_features(self, images):
        return F.avg_pool2d(images.square(), 2)  # (B, 3, 3, 3)


class Sequence(Patches):
    """Gives the same tokens as a sequence that is read at a place, or in the mean over some."""

    def __init__(self, position, kept=slice(None)):
        super().__init__()
        self.position, self.kept = position, kept

    def forward_features(self, images):
        return super().forward_features(images).flatten(2).mT[:, self.kept]  # (B, L, 3)


@pytest.mark.parametrize("network", [Patches(), Sequence(4), Sequence(None, slice(4, 5))])
def test_receptive_field_of_a_patch_is_that_patch(network, tmp_path):
    field = receptive_field(network, torch.ones(2, 3, 6, 6))
    expected = torch.zeros(6, 6)
    expected[2:4, 2:4] = 1
    torch.testing.assert_close(field, expected)
    draw_receptive_field(tmp_path / "deep" / "field.png", network, torch.ones(1, 3, 6, 6))
    assert (tmp_path / "deep" / "field.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("precision, words", [("16-mixed", "gradient scaler"), ("8", "choose one of")])
def test_precision_that_is_not_known_is_refused(precision, words, tmp_path):
    with pytest.raises(UserError, match=words):
        check_machine(small_config(tmp_path, f"optim.precision={precision}"))


def test_half_precision_on_a_cpu_without_it_is_refused(tmp_path, monkeypatch):
    cfg = small_config(tmp_path, "optim.precision=bf16-mixed")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="no bfloat16 arithmetic: set optim.precision=32-true"):
        check_machine(cfg)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    check_machine(cfg)


def test_unknown_or_missing_backend_is_refused(tmp_path):
    with pytest.raises(UserError, match="trainer.backend=fast is not supported: choose one of auto"):
        check(small_config(tmp_path, "trainer.backend=fast"))
    with pytest.raises(UserError, match="set trainer.backend=auto"):
        check(small_config(tmp_path, "trainer.backend=mamba_ssm"))


def test_converted_weights_are_scored_like_the_run_they_came_from(tmp_path):
    cfg = small_config(tmp_path)
    network = train.build_model(cfg)
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    cfg.output.pictures = False
    metrics = evaluate.evaluate_checkpoint(cfg, path, tmp_path)
    assert (
        metrics["top1"] == evaluate.score(cfg, network, torch.device("cpu"))["top1"] and "steps_trained" not in metrics
    )


def test_validation_changes_neither_weights_nor_generators_nor_the_hash_and_is_in_the_metrics(tmp_path, monkeypatch):
    states, results, steps = [], [], 2 * BATCHES_AN_EPOCH + 1
    fit = train.fit

    def watched(cfg, module, *arguments):
        trainer = fit(cfg, module, *arguments)
        states.append([*module.state_dict().values(), torch.get_rng_state()])
        return trainer

    monkeypatch.setattr(train, "fit", watched)
    for every in ("null", 1, 2):
        cfg = small_config(tmp_path, "model.network.drop_path=0.2", f"output.validate_every={every}", steps=steps)
        results.append((hash_of(cfg), train.run(cfg, tmp_path / str(every))))
    without, other, third = states
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(without, other, third, strict=True))
    (digest, never), (again, each), (_, second) = results
    assert digest == again and "top1_best" not in never
    assert never["top1"] == each["top1"] <= each["top1_best"] and 1 <= each["best_epoch"] <= steps / BATCHES_AN_EPOCH
    assert never["top1_average"] == each["top1_average"] <= each["top1_average_best"]
    assert second["top1_best"] <= each["top1_best"] and second["best_epoch"] != 1


class Stops(train.pl.Callback):
    """Ends a training inside its second epoch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == BATCHES_AN_EPOCH + 3:
            raise RuntimeError("stopped")


def test_what_was_scored_before_a_stop_is_kept(tmp_path):
    def scored(folder, *callbacks):
        often = ["output.checkpoint_every=4", "output.validate_every=1"]
        cfg = small_config(folder, *often, steps=BATCHES_AN_EPOCH + 6)
        module, data = train.prepare(cfg)
        validation = train.Validation(cfg, evaluation_batches(cfg), data.sampler)
        train.fit(cfg, module, data, folder, [validation, *callbacks])
        return validation.curves

    with pytest.raises(RuntimeError, match="stopped"):
        scored(tmp_path / "stopped", Stops())
    resumed, unbroken = scored(tmp_path / "stopped"), scored(tmp_path / "unbroken")
    assert resumed == unbroken and set(resumed[""]) == set(resumed["_average"]) == {1}
