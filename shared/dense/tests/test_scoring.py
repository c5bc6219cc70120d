"""Scores are pycocotools', mmdet's and mmseg's own where these round, and a matrix written out by hand."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.dense import run
from shared.dense.data import open_set
from shared.dense.model import config_of, library_of
from shared.dense.scoring import detection_scores, predictions, score, segmentation_scores
from shared.dense.tests.small import Tiny, installed, small_config
from shared.errors import UserError

pytestmark = [installed, pytest.mark.slow]
CPU = torch.device("cpu")
AP_NAMES = {"": "mAP", "_50": "mAP_50", "_75": "mAP_75"}


def test_set(cfg, folder: Path):
    library = library_of(cfg.dense)
    return library, open_set(library, config_of(library, cfg.dense, (8, 8, 16, 16)), cfg, "test", folder)


test_set.__test__ = False


def guesses(images) -> list:
    """Return, as a detector's answers, every object of every image shifted by some pixels, some with a wrong class."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    from pycocotools import mask

    generator, answers = np.random.default_rng(5), []
    for index in range(len(images)):
        about = images.get_data_info(index)
        boxes, labels, masks = [], [], []
        for thing in about["instances"]:
            shift = generator.integers(-3, 4, 2)
            polygon = (np.array(thing["mask"][0]).reshape(-1, 2) + shift).ravel().tolist()
            boxes.append(np.array(thing["bbox"]) + np.tile(shift, 2))
            labels.append((thing["bbox_label"] + (generator.random() < 0.2)) % 3)
            masks.append(mask.decode(mask.merge(mask.frPyObjects([polygon], 64, 64))).astype(bool))
        objects = InstanceData(
            bboxes=torch.tensor(np.array(boxes)),
            labels=torch.tensor(labels),
            scores=torch.tensor(generator.random(len(boxes))),
            masks=torch.tensor(np.array(masks)),
        )
        size = {"img_id": about["img_id"], "ori_shape": (64, 64)}
        answers.append(DetDataSample(pred_instances=objects, metainfo=size))
    return answers


def test_the_scores_of_a_detector_are_those_of_pycocotools_and_of_mmdet(tmp_path, capfd):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    library, images = test_set(small_config("detection", tmp_path), tmp_path)
    answers = guesses(images)
    scores = detection_scores(library, images, iter(answers), tmp_path)
    assert scores["n_test"] == len(images) == 16
    assert capfd.readouterr().out == ""
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(images.ann_file)
            evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / f"predictions.{kind}.json")), kind)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        for number, end in enumerate(AP_NAMES):
            assert scores[f"ap_{name}{end}"] == evaluation.stats[number] and 0.1 < evaluation.stats[number] < 0.9
    metric = library.build({"type": "CocoMetric", "metric": ["bbox", "segm"], "ann_file": images.ann_file}, "METRICS")
    metric.dataset_meta = images.metainfo
    metric.process({}, [answer.to_dict() for answer in answers])
    own = metric.evaluate(len(images))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for end, theirs in AP_NAMES.items():
            assert round(scores[f"ap_{name}{end}"], 3) == own[f"coco/{kind}_{theirs}"]


def test_a_detector_that_finds_nothing_has_the_score_zero(tmp_path):
    library, images = test_set(small_config("detection", tmp_path), tmp_path)
    answers = guesses(images)
    for answer in answers:
        answer.pred_instances = answer.pred_instances[:0]
    scores = detection_scores(library, images, iter(answers), tmp_path)
    assert scores.pop("n_test") == 16 and set(scores.values()) == {0.0} and len(scores) == 6


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
@pytest.mark.parametrize("part", ["backbone", "head"])
def test_a_network_that_is_not_finite_has_no_score(kind, part, tmp_path):
    cfg = small_config(kind, tmp_path)
    model = run.prepare(cfg, Tiny())[0].model
    list(model.backbone.parameters() if part == "backbone" else model.parameters())[-1].data[0] = float("nan")
    with pytest.raises(UserError, match="not finite: the training diverged, lower dense.optim.lr"):
        run.scores_of(cfg, model, CPU, tmp_path)


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_a_run_is_scored_as_its_checkpoint_is(kind, tmp_path):
    cfg, folder = small_config(kind, tmp_path), tmp_path / "row" / "seed0"
    metrics = run.run(cfg, Tiny(), folder)
    again = run.evaluate_checkpoint(cfg, Tiny(), folder / "last.ckpt", tmp_path / "again")
    assert again.keys() <= metrics.keys() and {name: metrics[name] for name in again} == again
    assert metrics["steps_trained"] == cfg.dense.steps and metrics["train_images"] == 64 and metrics["n_test"] == 16


def labels_of(images, chance: float) -> list:
    """Return, as a segmenter's answers, the labels of every image with as many others as ``chance`` says."""
    from mmengine.structures import PixelData

    generator, answers = torch.Generator().manual_seed(5), []
    for index in range(len(images)):
        sample = images.prepare_data(index)["data_samples"]
        truth = sample.gt_sem_seg.data
        truth[:, :9] = 255  # counts for nothing
        wrong = torch.rand(truth.shape, generator=generator) < chance
        guess = torch.where(wrong, torch.randint(0, 3, truth.shape, generator=generator), truth.long() % 255)
        sample.pred_sem_seg, sample.seg_logits = PixelData(data=guess), PixelData(data=torch.zeros(4, 64, 64))
        answers.append(sample)
    return answers


def test_the_scores_of_a_segmenter_are_those_of_mmseg_and_of_a_matrix_by_hand(tmp_path, caplog, capfd):
    # Sums of whole numbers are exact in double precision; one division and a mean remain.
    tolerance = 1e-12
    library, images = test_set(small_config("segmentation", tmp_path), tmp_path)
    answers = labels_of(images, 0.3)
    matrix = np.zeros((4, 4))
    for answer in answers:
        truth, guess = answer.gt_sem_seg.data.numpy().ravel(), answer.pred_sem_seg.data.numpy().ravel()
        np.add.at(matrix, (truth[truth != 255], guess[truth != 255]), 1)
    scores = segmentation_scores(library, images, iter(answers))
    assert "prefix" not in caplog.text + "".join(capfd.readouterr())
    right, labelled, guessed = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    by_hand = {
        "miou": (right / (labelled + guessed - right)).mean(),
        "macc": (right / labelled).mean(),
        "aacc": right.sum() / matrix.sum(),
        "n_test": 16,
    }
    assert scores == pytest.approx(by_hand, rel=tolerance) and 0.3 < scores["miou"] < 0.8
    metric = library.build({"type": "IoUMetric"}, "METRICS")
    metric.dataset_meta = images.metainfo
    metric.process({}, [answer.to_dict() for answer in answers])
    own = metric.evaluate(len(images))
    rounded = {
        name: round(100 * scores[key], 2) for name, key in (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc"))
    }
    assert rounded == pytest.approx(own, abs=1e-5)  # mmseg divides in single precision


def test_classes_that_never_occur_are_left_out_of_the_means(tmp_path):
    library, images = test_set(small_config("segmentation", tmp_path), tmp_path)
    answers = labels_of(images, 0.0)
    for answer in answers:
        answer.gt_sem_seg.data[answer.gt_sem_seg.data == 3] = 255
        answer.pred_sem_seg.data[answer.pred_sem_seg.data == 3] = 0
    scores = segmentation_scores(library, images, iter(answers))
    assert scores == {"n_test": 16.0, "miou": 1.0, "macc": 1.0, "aacc": 1.0}
    # Predicted, but nowhere true: the intersection over union counts, recall does not exist.
    answers[0].pred_sem_seg.data[:, 30:40] = 3
    scores = segmentation_scores(library, images, iter(answers))
    assert 0.7 < scores["miou"] < 0.75 and scores["macc"] > 0.9


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_test_at_several_scales_averages_the_probabilities_of_scales_and_flips(precision, tmp_path):
    from mmcv import imrescale
    from PIL import Image

    ratios = [0.5, 1.0, 1.75]
    cfg = small_config("segmentation", tmp_path, {"dense.ratios": ratios, "optim.precision": precision})
    model = run.prepare(cfg, Tiny())[0].model.eval()
    model = model.double() if precision == "64-true" else model
    scores = run.scores_of(cfg, model, CPU, tmp_path)
    library, images = test_set(cfg, tmp_path)
    answers = list(predictions(cfg, model, images, CPU))
    assert segmentation_scores(library, images, iter(answers))["miou"] == scores["miou"] == scores["miou_single_scale"]
    dtype = next(model.parameters()).dtype
    mean, deviation = (getattr(model.data_preprocessor, name) for name in ("mean", "std"))
    for number, answer in enumerate(answers):
        with Image.open(images.get_data_info(number)["img_path"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        total = torch.zeros(4, 64, 64, dtype=dtype)
        for ratio in ratios:
            resized = torch.from_numpy(imrescale(pixels, ratio)).permute(2, 0, 1)
            view = ((resized - mean) / deviation)[None].to(dtype)
            for flips in (False, True):
                with torch.no_grad():
                    logits = model.encode_decode(view.flip(3) if flips else view, [{"img_shape": view.shape[2:]}])
                logits = logits.flip(3) if flips else logits
                total += torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")[0].softmax(0)
        answer.pred_sem_seg.data = total.argmax(0, keepdim=True)
    assert segmentation_scores(library, images, iter(answers))["miou"] == scores["miou_multi_scale"]
    assert scores["miou_multi_scale"] != scores["miou_single_scale"]


def test_no_scales_no_further_scores(tmp_path):
    cfg = small_config("segmentation", tmp_path)
    library, model = library_of(cfg.dense), run.prepare(cfg, Tiny())[0].model
    config = config_of(library, cfg.dense, model.backbone.channels)
    assert set(score(cfg, library, config, model, CPU, tmp_path)) == {"n_test", "miou", "macc", "aacc"}
