"""A row of detection or segmentation says ``task=dense`` and ``dense=...``, both or neither."""

import pytest

from opera.backbones import build_backbone
from opera.dense import backbone_of, check
from opera.tests.small import small_config
from shared.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task=dense"], "task.kind=dense and dense=null: set task=dense and dense=<recipe> together, or neither$"),
        (
            ["dense=camvid"],
            "task.kind=probe and dense=a recipe: set task=dense and dense=<recipe> together, or neither$",
        ),
        (["task=dense", "dense=camvid"], "dense.weights is not read here: say task.weights, or leave"),
        (
            ["task=dense", "dense=mask-rcnn-r50-1x", "dense.pretraining=digits-opera"],
            "dense.weights is not read here: say task.weights, or leave",
        ),
        (
            ["task=dense", "dense=camvid", "dense.weights=null", "dense.kind=depth"],
            "dense.kind=depth is unknown: choose",
        ),
        (
            ["task=dense", "dense=mask-rcnn-r50-1x", "dense.optim.precision=bf16-mixed"],
            "dense.optim.precision=bf16-mixed is not supported for detection: .*choose one of 32-true$",
        ),
    ],
)
def test_a_task_that_does_not_go_with_dense_is_refused(overrides, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        check(small_config(tmp_path, *overrides))


@pytest.mark.parametrize("overrides", [[], ["task=dense", "dense=camvid", "dense.weights=null"]])
def test_both_and_neither_are_accepted(overrides, tmp_path):
    check(small_config(tmp_path, *overrides))


def test_a_backbone_without_maps_of_several_sizes_is_refused(tmp_path):
    cfg = small_config(tmp_path, "task=dense", "dense=camvid", "dense.weights=null")
    with pytest.raises(UserError, match="model.backbone=.* has no maps of several sizes: choose a ResNet or a ViT$"):
        backbone_of(cfg, build_backbone(cfg.model.backbone, 8))
