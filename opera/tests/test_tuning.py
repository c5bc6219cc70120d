"""The probe and fine-tuning: what moves and what stays, the groups and rates of DeiT, resumption, official weights."""

import hashlib

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from opera import train
from opera.backbones import build_backbone
from opera.moco_checkpoints import linear_classifier
from opera.tests.small import small_config
from opera.tuning import TuningModule, tuning_data
from shared.errors import UserError
from shared.training.fit import fit

FINETUNE = ["task=finetune", "task.sets=[digits]", "task.epochs=2", "task.batch_size=128", "task.warmup_epochs=0"]


def tuned(folder, backbone: nn.Module, *overrides: str, callbacks=()) -> TuningModule:
    """Tune a backbone on the digits as a run does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = small_config(folder, *overrides)
    data, test = tuning_data(cfg, "digits")
    module = TuningModule(backbone, len(test.classes), cfg, data.sampler.steps)
    fit(cfg, module, data, folder, callbacks)
    return module


def with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("convnet-tiny", 8)


class Modes(pl.Callback):
    """Collects whether the backbone was in training mode at every step."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, module, *arguments):
        self.seen.add(module.model.backbone.training)


@pytest.mark.parametrize("mode", [True, False])
def test_a_probe_leaves_the_backbone_and_its_statistics_as_they_were(tmp_path, mode):
    backbone, modes = with_statistics().train(mode), Modes()
    assert any("running_mean" in name for name in backbone.state_dict())
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    module = tuned(tmp_path, backbone, "task.neighbours=null", callbacks=[modes])
    assert modes.seen == {False}
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert module.model.head.bias.abs().min() > 0  # which began at 0


@pytest.mark.parametrize("mode", [True, False])
def test_fine_tuning_moves_every_parameter_and_statistic(tmp_path, mode):
    backbone, modes = with_statistics().train(mode), Modes()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    tuned(tmp_path, backbone, *FINETUNE, callbacks=[modes])
    assert modes.seen == {True}
    assert not any(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_probe_learns_what_a_linear_map_can(tmp_path):
    pixels = nn.Flatten()
    pixels.num_features = 3 * 64
    pixels.register_parameter("unused", nn.Parameter(torch.zeros(1)))  # tells the type of the images
    scores = train.evaluate_on(small_config(tmp_path, "task.epochs=10"), pixels, "digits", tmp_path)
    assert 0.9 < scores["top1"] < scores["top5"] and scores["top1_knn"] > 0.9


def module_of(folder, backbone: str, *overrides: str) -> TuningModule:
    cfg = small_config(folder, *overrides)
    return TuningModule(build_backbone(backbone, 32), 10, cfg, 100)


def test_biases_normalisations_positions_and_class_token_are_not_decayed(tmp_path):
    module = module_of(tmp_path, "vit-tiny", *FINETUNE)
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    decayed, others = ({names[p]: p for p in group["params"]} for group in module.parameter_groups())
    assert {"backbone.pos_embed", "backbone.cls_token", "head.bias", "backbone.norm.weight"} <= set(others)
    assert {"head.weight", "backbone.patch_embed.proj.weight", "backbone.blocks.0.mlp.fc1.weight"} <= set(decayed)
    assert len(decayed) + len(others) == len(list(module.model.parameters()))
    assert all(p.ndim < 2 or name in ("backbone.pos_embed", "backbone.cls_token") for name, p in others.items())
    optimizer = module.configure_optimizers()["optimizer"]
    sizes = [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert sizes == [(0.05, len(decayed)), (0.0, len(others))]
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["initial_lr"] == 0.0005


def test_a_probe_trains_the_classifier_alone_at_a_rate_for_256_images(tmp_path):
    module = module_of(tmp_path, "vit-tiny", "task.lr=0.3", "task.batch_size=64")
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert group["initial_lr"] == pytest.approx(0.3 * 64 / 256) and group["momentum"] == 0.9
    assert [id(p) for p in group["params"]] == [id(p) for p in module.model.head.parameters()]


def test_without_mixing_the_loss_is_the_mean_cross_entropy(tmp_path):
    module = module_of(tmp_path, "resnet-small", "task.batch_size=4").eval()
    batch = {"images": torch.randn(4, 3, 32, 32), "labels": torch.tensor([3, 1, 4, 1])}
    expected = nn.functional.cross_entropy(module.model(batch["images"]), batch["labels"])
    torch.testing.assert_close(module.loss(batch, 0), expected)


def test_repeated_views_stand_in_one_batch(tmp_path):
    data, _ = tuning_data(small_config(tmp_path, "task.repeats=3", "task.batch_size=6"), "digits")
    assert len(data.sampler) == 2 * (1438 // 6)
    _, samples = next(iter(data.sampler))
    batch = data.batches[(0, samples)]
    assert len(batch["indices"].unique()) == 2
    with pytest.raises(UserError, match="task.repeats=0: set 1"):
        tuning_data(small_config(tmp_path, "task.repeats=0"), "digits")


def test_stochastic_depth_is_drawn_in_training_alone(tmp_path):
    overrides = ["model=vit-tiny", "data.image_size=8", "model.backbone=vit-tiny"]
    cfg = small_config(tmp_path, *overrides, "task.drop_path=0.5")
    plain = build_backbone("vit-tiny", 8)
    deep = train.with_drop_path(cfg, plain)
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(deep.eval()(images), plain.eval()(images))
    deep.train()
    assert not torch.equal(deep(images), deep(images))
    assert train.with_drop_path(small_config(tmp_path, *overrides), plain) is plain


class Killed(Exception):
    pass


class Kill(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 14:
            raise Killed


@pytest.mark.parametrize("overrides", [["task.neighbours=null"], FINETUNE], ids=["probe", "finetune"])
def test_a_tuning_that_was_killed_ends_as_an_unbroken_one(tmp_path, overrides):
    every = "output.checkpoint_every=4"
    unbroken = tuned(tmp_path / "one", with_statistics(), every, *overrides).state_dict()
    with pytest.raises(Killed):
        tuned(tmp_path / "other", with_statistics(), every, *overrides, callbacks=[Kill()])
    actual = tuned(tmp_path / "other", with_statistics(), every, *overrides).state_dict()
    assert all(torch.equal(actual[name], value) for name, value in unbroken.items())


@pytest.fixture
def official(tmp_path):
    """Return a file in MoCo-v3's form with the backbone of the digits, and that backbone."""
    backbone = with_statistics()
    state = {f"module.momentum_encoder.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    return tmp_path / "moco.pth.tar", backbone


def test_a_task_starts_from_an_official_file_without_a_pretraining(tmp_path, official):
    path, backbone = official
    cfg = small_config(tmp_path, f"task.weights={path}")
    train.check(cfg)
    assert train.seconds_of_run(cfg) > 0
    metrics = train.run(cfg, tmp_path / "run")
    expected = train.evaluate_on(cfg, backbone, "digits", tmp_path / "expected")
    assert {name: metrics[name] for name in expected} == expected
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert metrics["weights"] == digest and (tmp_path / "run" / digest[:12] / "digits/last.ckpt").is_file()
    assert "pretrain_seconds" not in metrics and not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="nothing.tar is missing"):
        train.run(small_config(tmp_path, "task.weights=nothing.tar"), tmp_path / "run")


def test_an_untrained_network_is_that_of_the_seed(tmp_path):
    overrides = ["task.weights=untrained", "task.epochs=1"]
    metrics, again = (train.run(small_config(tmp_path, *overrides), tmp_path / name) for name in ("a", "b"))
    other = train.run(small_config(tmp_path, *overrides, "seed=1"), tmp_path / "c")
    assert metrics == again and metrics["top1_knn"] != other["top1_knn"] and not (tmp_path / "runs").exists()


def test_the_classifier_of_an_official_probe_is_found(tmp_path, official):
    assert linear_classifier(official[0]) is None
    head = {"module.head.weight": torch.ones(7, 4), "module.head.bias": torch.zeros(7)}
    torch.save({"state_dict": head | {"module.norm.weight": torch.ones(4)}}, tmp_path / "linear.pth.tar")
    actual = linear_classifier(tmp_path / "linear.pth.tar")
    assert actual["weight"].shape == (7, 4) and actual["bias"].shape == (7,)
