"""Scores of a detector, COCO's average precision, and of a segmenter, mean intersection over union, without rounding.

Predictions are the library's, behind its transforms for testing; the precision is pycocotools', the areas of
intersections and unions are mmseg's. Both libraries print their scores with three and two digits: here they keep all.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from shared.dense.data import open_set, prepared
from shared.dense.libraries import Library, quiet
from shared.errors import UserError
from shared.training.checks import autocast_context
from shared.training.ranks import rank, world_size

PRECISIONS = {"": 0, "_50": 1, "_75": 2}  # in pycocotools' list of twelve numbers


class TestImages(Dataset):
    """The images of a test set one by one, as models take them: {"inputs": [...], "data_samples": [...]}."""

    def __init__(self, images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, list]:
        sample = prepared(self.images, index)
        is_several = isinstance(sample["inputs"], list)  # of test-time augmentation
        return sample if is_several else {name: [sample[name]] for name in ("inputs", "data_samples")}


def _shared(cfg, images) -> DataLoader:
    """Return this rank's part of the images: of R ranks, rank r has images r, r + R, ..."""
    mine = Subset(TestImages(images), range(rank(), len(images), world_size()))
    # A generator of its own: a loader otherwise draws from torch's global one, in the middle of a training.
    options = {"num_workers": cfg.trainer.workers, "generator": torch.Generator().manual_seed(0)}
    return DataLoader(mine, batch_size=None, **options)


def gathered(results: list) -> list:
    """Return all ranks' results in the order of the images."""
    if world_size() == 1:
        return results
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, results)
    return [part[place] for place in range(len(parts[0])) for part in parts if place < len(part)]


@torch.no_grad()
def predictions(cfg, model: nn.Module, images, device: torch.device) -> Iterator:
    """Yield the model's answers for this rank's images, in order: mmengine's data elements, on the CPU."""
    model = model.to(device).eval()
    for batch in _shared(cfg, images):
        yield from (answer.cpu() for answer in _answers(cfg, model, batch, device))


def _answers(cfg, model: nn.Module, batch: dict[str, list], device: torch.device) -> list:
    data = model.data_preprocessor(batch, False)
    data["inputs"] = data["inputs"].to(next(model.parameters()).dtype)
    with autocast_context(cfg, device):
        return model(**data, mode="predict")


def score(
    cfg, library: Library, config, model: nn.Module, device: torch.device, folder: Path, multi_scale: bool = True
) -> dict[str, float]:
    """Return the scores of all test images, fractions, and ``n_test``; the ranks share the images.

    Detection: ap_box, ap_box_50, ap_box_75 and those of masks; the predictions stay in ``folder``. Segmentation: miou,
    macc, aacc and, where ``dense.ratios`` names scales, miou_single_scale and, with ``multi_scale``, miou_multi_scale.
    UserError for outputs that are not finite.
    """
    images = open_set(library, config, cfg, "test", folder)
    if not all(value.isfinite().all() for value in model.state_dict().values()):  # mmdet would just find no object
        raise UserError("the weights of the network are not finite: the training diverged, lower dense.optim.lr")
    if cfg.dense.kind == "detection":
        return detection_scores(library, images, predictions(cfg, model, images, device), folder)
    scores = segmentation_scores(library, images, predictions(cfg, model, images, device))
    if cfg.dense.ratios:
        scores["miou_single_scale"] = scores["miou"]
    if cfg.dense.ratios and multi_scale:
        images = open_set(library, config, cfg, "test", folder, several_scales(config, cfg.dense.ratios))
        model = library.build({"type": "SegTTAModel", "module": model})
        answers = tta_predictions(cfg, model, images, device)
        scores["miou_multi_scale"] = segmentation_scores(library, images, answers)["miou"]
    return scores


def several_scales(config, ratios: list[float]) -> list[dict]:
    """Return the transforms of mmseg's test-time augmentation: every ratio of the size, plain and mirrored."""
    steps = config.test_dataloader.dataset.pipeline
    load, annotate = (
        [step for step in steps if step["type"] == name] for name in ("LoadImageFromFile", "LoadAnnotations")
    )
    scales = [{"type": "Resize", "scale_factor": float(ratio), "keep_ratio": True} for ratio in ratios]
    flips = [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in (0.0, 1.0)]
    return [*load, {"type": "TestTimeAug", "transforms": [scales, flips, annotate, [{"type": "PackSegInputs"}]]}]


@torch.no_grad()
def tta_predictions(cfg, model: nn.Module, images, device: torch.device) -> Iterator:
    """Yield the answers of mmseg's test-time augmentation, the softmax of every scale and flip averaged."""
    model = model.to(device).eval()
    for sample in _shared(cfg, images):
        views = [
            dict(zip(sample, ([value] for value in view), strict=True)) for view in zip(*sample.values(), strict=True)
        ]
        answers = [_answers(cfg, model.module, view, device) for view in views]
        yield from (answer.cpu() for answer in model.merge_preds(list(zip(*answers, strict=True))))


def detection_scores(library: Library, images, answers: Iterator, folder: Path) -> dict[str, float]:
    """Return COCO's precisions of boxes and masks, of several ranks to the first alone; nothing to the others.

    The predictions stay in ``folder`` as COCO's result files.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    described = {"type": "CocoMetric", "metric": ["bbox", "segm"], "ann_file": images.ann_file}
    with quiet():
        metric, truth = library.build(described, "METRICS"), COCO(images.ann_file)
    metric.dataset_meta, metric.cat_ids = images.metainfo, images.cat_ids
    for answer in answers:
        metric.process({}, [answer.to_dict()])
    scored, results = zip(*gathered(metric.results), strict=True)
    if rank() > 0:
        return {}
    scores: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    files = metric.results2json(results, str(folder / "predictions"))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        found = json.loads(Path(files[kind]).read_text(encoding="utf-8"))
        precision = np.zeros(3)  # without a single box
        with quiet():
            if found:
                evaluation = COCOeval(truth, truth.loadRes(found), kind)
                evaluation.params.imgIds = [image["img_id"] for image in scored]
                evaluation.params.catIds = images.cat_ids
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                precision = evaluation.stats
        scores |= {f"ap_{name}{end}": float(precision[place]) for end, place in PRECISIONS.items()}
    return scores | {"n_test": float(len(results))}


def segmentation_scores(library: Library, images, answers: Iterator) -> dict[str, float]:
    """Return miou, macc (over the classes that occur) and aacc of every pixel but ignored ones."""
    # Without a prefix for the names of its scores it warns, though nobody asks for these names.
    metric = library.build({"type": "IoUMetric", "prefix": "segmentation"}, "METRICS")
    metric.dataset_meta = images.metainfo
    finite = []
    for answer in answers:
        finite.append(bool(answer.seg_logits.data.isfinite().all()))
        metric.process({}, [answer.to_dict()])
    results = gathered(list(zip(finite, metric.results, strict=True)))
    if not all(is_finite for is_finite, _ in results):  # on every rank, or the others would wait
        raise UserError("the outputs of the network are not finite: the training diverged, lower dense.optim.lr")
    areas = [torch.stack(parts).double().sum(0).numpy() for parts in zip(*(a for _, a in results), strict=True)]
    intersection, union, _, labelled = areas
    with np.errstate(invalid="ignore"):
        ratio, recall = intersection / union, intersection / labelled
    return {
        "miou": float(np.nanmean(ratio)),
        "macc": float(np.nanmean(recall)),
        "aacc": float(intersection.sum() / labelled.sum()),
        "n_test": float(len(results)),
    }
