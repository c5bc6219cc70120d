"""mmdet and mmseg in one process: their own configs by name, models that train and predict, nothing left behind."""

import subprocess
import sys

import pytest
import torch

from shared.dense import libraries
from shared.errors import UserError
from shared.training.ranks import with_global_batchnorm

MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
UPERNET = "mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
installed = pytest.mark.skipif(
    bool(libraries.missing_modules()), reason="the extra for detection and segmentation is not here: make setup-dense"
)


@pytest.fixture(scope="module")
def mmdet():
    return libraries.detection()


@pytest.fixture(scope="module")
def mmseg():
    return libraries.segmentation()


@pytest.mark.parametrize("use", [libraries.require_dense, libraries.detection, libraries.segmentation])
def test_without_the_extra_one_sentence_names_the_command(monkeypatch, use):
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "mmdet" else object())
    with pytest.raises(UserError, match=r"not installed \(mmdet\): run `make setup-dense`$"):
        use()


@pytest.mark.slow
def test_neither_library_is_imported_before_it_is_used():
    code = "import sys, shared.dense.libraries; print(sorted({'cv2', 'mmcv', 'mmdet', 'mmseg'} & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mmdet::mask_rcnn/no-such-file.py", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", UPERNET, "mmdet::"]
)
def test_a_config_that_the_library_does_not_have_is_refused_with_a_sentence(mmdet, name):
    with pytest.raises(UserError, match="is no config file of mmdet: give mmdet::"):
        mmdet.config(name)


@installed
@pytest.mark.slow
def test_differences_change_the_librarys_own_config_and_not_its_file(mmdet):
    original = mmdet.config(MASK_RCNN)
    assert original.model.roi_head.bbox_head.num_classes == 80 and original.train_cfg.max_epochs == 12
    changed = mmdet.config(
        MASK_RCNN, {"model.roi_head.bbox_head.num_classes": 3, "model": {"backbone": {"init_cfg": None}}}
    )
    assert changed.model.roi_head.bbox_head.num_classes == 3
    assert changed.model.backbone.init_cfg is None and changed.model.backbone.depth == 50
    assert mmdet.config(MASK_RCNN).model == original.model


@installed
@pytest.mark.slow
def test_parts_of_one_name_come_from_the_library_that_builds_and_no_scope_is_left(mmdet, mmseg):
    from mmengine.registry import DefaultScope

    before = DefaultScope.get_current_instance()
    for library in (mmdet, mmseg, mmdet):
        flip = library.build({"type": "RandomFlip", "prob": 0.5}, "TRANSFORMS")
        preprocessor = library.build({"type": "DetDataPreprocessor" if library is mmdet else "SegDataPreProcessor"})
        assert {type(flip).__module__.split(".")[0], type(preprocessor).__module__.split(".")[0]} == {library.name}
        assert DefaultScope.get_current_instance() is before
    with pytest.raises(KeyError):
        mmseg.build({"type": "MaskRCNN"})


@installed
@pytest.mark.slow
@pytest.mark.parametrize("aligned", [False, True])
def test_mmcvs_own_layers_run_on_the_stand_in(mmdet, aligned):
    import mmcv.ops

    layer = mmcv.ops.RoIAlign((2, 2), spatial_scale=0.5, sampling_ratio=0, aligned=aligned)
    inputs = torch.rand(1, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rois = torch.tensor([[0, 1.0, 1.0, 8.0, 9.0], [0, -4.0, 2.0, 5.0, 30.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: layer(x, rois), inputs)
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [0, 0, 4, 5], [9, 9, 12, 12]])
    scores, classes = torch.tensor([0.5, 0.9, 0.9, 0.2]), torch.tensor([0, 0, 1, 0])
    kept, indices = mmcv.ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})
    assert indices.tolist() == [1, 2, 3]
    torch.testing.assert_close(kept, torch.cat([boxes, scores[:, None]], dim=1)[indices])


def detection_sample(height: int, width: int):
    """Return what mmdet knows of an image with two objects."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    corners = torch.tensor([[4, 6, 40, 50], [30, 10, 90, 60]])
    masks = np.zeros((2, height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, corners.tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    objects = InstanceData(bboxes=corners.float(), labels=torch.tensor([0, 2]), masks=BitmapMasks(masks, height, width))
    size = {"img_shape": (height, width), "ori_shape": (height, width), "batch_input_shape": (height, width)}
    return DetDataSample(gt_instances=objects, metainfo=size | {"scale_factor": (1.0, 1.0), "img_id": 0})


def losses_of(model, batch: dict) -> dict[str, float]:
    """Take one loss and its gradient; return the loss's parts."""
    batch = model.data_preprocessor(batch, training=True)
    total, parts = model.parse_losses(model(**batch, mode="loss"))
    total.backward()
    assert torch.isfinite(total)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    return {name: value.item() for name, value in parts.items()}


def tiny_image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@installed
@pytest.mark.slow
def test_mask_rcnn_from_mmdets_config_takes_a_step_and_predicts_on_the_cpu(mmdet, capfd):
    torch.manual_seed(0)
    config = mmdet.config(MASK_RCNN, {"model.backbone.init_cfg": None})
    model = mmdet.build(config.model)
    model.init_weights()
    assert capfd.readouterr().out == ""
    model.train()
    image, sample = tiny_image(64, 96), detection_sample(64, 96)
    losses = losses_of(model, {"inputs": [image], "data_samples": [sample]})
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"} <= losses.keys()
    with torch.no_grad():
        (result,) = model.eval().test_step({"inputs": [image], "data_samples": [detection_sample(64, 96)]})
    instances = result.pred_instances
    assert instances.bboxes.shape[1] == 4 and instances.masks.shape[1:] == (64, 96)
    assert len(instances.bboxes) == len(instances.scores) == len(instances.labels) == len(instances.masks) <= 100


@installed
@pytest.mark.slow
def test_upernet_from_mmsegs_config_takes_a_step_and_predicts_on_the_cpu(mmseg):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    config = mmseg.config(UPERNET, {"model.pretrained": None, "model.data_preprocessor.size": (64, 64)})
    # A batch of two, since PSP's pooling to 1 x 1 leaves batch norm one value a channel otherwise.
    model = with_global_batchnorm(mmseg.build(config.model))
    model.init_weights()
    model.train()
    size = {"img_shape": (64, 64), "ori_shape": (64, 64)}
    labels = torch.randint(0, 150, (1, 64, 64), generator=torch.Generator().manual_seed(4))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=size) for _ in range(2)]
    images = [tiny_image(64, 64)] * 2
    losses = losses_of(model, {"inputs": images, "data_samples": samples})
    assert {"decode.loss_ce", "aux.loss_ce"} <= losses.keys()
    with torch.no_grad():
        (result,) = model.eval().test_step({"inputs": images[:1], "data_samples": samples[:1]})
    assert result.pred_sem_seg.data.shape == (1, 64, 64) and result.seg_logits.data.shape == (150, 64, 64)
