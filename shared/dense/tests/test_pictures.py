"""Pictures of predictions: a row of three for each of the first images, whatever the network answers."""

import pytest
import torch
from PIL import Image

from shared.dense import libraries

installed = pytest.mark.skipif(
    bool(libraries.missing_modules()), reason="the extra for detection and segmentation is not here: make setup-dense"
)


class Shown:
    metainfo = {"palette": [(255, 0, 0), (0, 255, 0), (0, 0, 255)]}


def detected(path, boxes: int):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    answer = DetDataSample(metainfo={"img_path": str(path), "scale_factor": (2.0, 2.0)})
    things = {"bboxes": torch.tensor([[2.0, 2.0, 20.0, 20.0]]).repeat(boxes, 1), "labels": torch.arange(boxes) % 3}
    answer.gt_instances = InstanceData(**things)
    answer.pred_instances = InstanceData(**things, scores=torch.full((boxes,), 0.9))
    return answer


def segmented(path, label: int):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    answer = SegDataSample(metainfo={"img_path": str(path)})
    answer.gt_sem_seg = PixelData(data=torch.full((1, 32, 48), 255))
    answer.pred_sem_seg = PixelData(data=torch.full((1, 32, 48), label))
    return answer


@installed
@pytest.mark.slow
@pytest.mark.parametrize("make", [detected, segmented])
def test_the_first_images_are_drawn_and_no_more_are_asked_for(make, tmp_path):
    from shared.dense.pictures import SHOWN, draw_predictions

    Image.new("RGB", (48, 32), (90, 90, 90)).save(tmp_path / "image.png")
    asked = []

    def answers():
        for number in range(SHOWN + 3):
            asked.append(number)
            yield make(tmp_path / "image.png", number % 3)

    draw_predictions(tmp_path / "new" / "predictions.png", Shown, answers())
    with Image.open(tmp_path / "new" / "predictions.png") as picture:
        colours = {pixel for _, pixel in picture.convert("RGB").getcolors(2**24)}
    assert len(asked) == SHOWN and len(colours) > 3
