"""The stand-in for mmcv's compiled operations, held to RoIAlign and NMS written out from their definitions.

None of these tests needs mmcv: they call the functions with the arguments that mmcv's own Python passes.
"""

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch

from shared.dense import extension
from shared.errors import UserError

# Both sides are float64; sums of a few dozen terms of order 1 differ by their order only.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HEIGHT, WIDTH, SIZE, SCALE = 6, 7, (2, 3), 0.5

ROIS = torch.tensor(
    [
        [0, 2.0, 2.0, 9.0, 8.0],
        [1, 0.0, 0.0, 14.0, 12.0],  # the whole image
        [1, 3.3, 1.7, 4.1, 2.2],  # less than a cell of the map
        [0, 5.0, 5.0, 5.0, 5.0],  # no area
        [0, -6.0, -3.0, 4.0, 20.0],  # over three borders
        [1, 11.5, 9.0, 30.0, 40.0],  # over the lower right corner
        [0, 40.0, 40.0, 60.0, 50.0],  # outside
        [1, -60.0, -50.0, -40.0, -40.0],  # outside on the other side
    ],
    dtype=torch.float64,
)


def bilinear(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Return the (C,) values of ``image`` (C, H, W) at a point; up to a cell outside the border's, beyond it 0."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    above = image[:, top, left] * (1 - (x - left)) + image[:, top, right] * (x - left)
    below = image[:, bottom, left] * (1 - (x - left)) + image[:, bottom, right] * (x - left)
    return above * (1 - (y - top)) + below * (y - top)


def roi_align(images: torch.Tensor, rois: torch.Tensor, sampling_ratio: int, aligned: bool) -> torch.Tensor:
    """Return (R, C, *SIZE): in every bin the mean over a grid of points, by the definition (Mask R-CNN, section 3)."""
    rows = []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * SCALE - 0.5 * aligned for corner in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        bin_height, bin_width = height / SIZE[0], width / SIZE[1]
        down = sampling_ratio or math.ceil(bin_height)
        across = sampling_ratio or math.ceil(bin_width)
        for row in range(SIZE[0]):
            for column in range(SIZE[1]):
                points = [
                    (y1 + (row + (i + 0.5) / down) * bin_height, x1 + (column + (j + 0.5) / across) * bin_width)
                    for i in range(down)
                    for j in range(across)
                ]
                values = [bilinear(images[int(index)], y, x) for y, x in points]
                rows.append(sum(values, images.new_zeros(images.shape[1])) / max(len(points), 1))
    return torch.stack(rows).view(len(rois), *SIZE, -1).permute(0, 3, 1, 2)


def keywords(sampling_ratio: int, aligned: bool, pool_mode: int = 1) -> dict:
    """Return what mmcv's RoIAlignFunction passes by name."""
    return {
        "aligned_height": SIZE[0],
        "aligned_width": SIZE[1],
        "spatial_scale": SCALE,
        "sampling_ratio": sampling_ratio,
        "pool_mode": pool_mode,
        "aligned": aligned,
    }


def images(requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, HEIGHT, WIDTH, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


def forward(inputs: torch.Tensor, rois: torch.Tensor, sampling_ratio: int, aligned: bool) -> torch.Tensor:
    output = inputs.new_full((len(rois), inputs.shape[1], *SIZE), torch.nan)
    empty = inputs.new_zeros(0)
    extension.roi_align_forward(inputs, rois, output, empty, empty, **keywords(sampling_ratio, aligned))
    return output


def backward(gradient: torch.Tensor, rois: torch.Tensor, sampling_ratio: int, aligned: bool) -> torch.Tensor:
    result = gradient.new_full(images().shape, torch.nan)
    empty = gradient.new_zeros(0)
    extension.roi_align_backward(gradient, rois, empty, empty, result, **keywords(sampling_ratio, aligned))
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_and_its_gradient_are_those_of_the_definition(sampling_ratio, aligned, device):
    inputs = images(requires_grad=True)
    expected = roi_align(inputs, ROIS, sampling_ratio, aligned)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected_gradient,) = torch.autograd.grad(expected, inputs, gradient)
    on_device = [tensor.detach().to(device) for tensor in (inputs, gradient, ROIS)]
    output = forward(on_device[0], on_device[2], sampling_ratio, aligned).cpu()
    torch.testing.assert_close(output, expected.detach(), **TOLERANCE)
    assert output[:6].abs().sum((1, 2, 3)).count_nonzero() >= 5 and not output[6:].any()
    result = backward(on_device[1], on_device[2], sampling_ratio, aligned).cpu()
    torch.testing.assert_close(result, expected_gradient, **TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_of_no_boxes_is_empty_and_its_gradient_zero(sampling_ratio, device):
    inputs, rois = images().to(device), ROIS[:0].to(device)
    assert forward(inputs, rois, sampling_ratio, True).shape == (0, 3, *SIZE)
    result = backward(inputs.new_zeros(0, 3, *SIZE), rois, sampling_ratio, True)
    assert result.shape == inputs.shape and not result.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_of_half_precision_is_computed_in_single_precision_and_rounded_once(dtype):
    inputs, rois = images().to(dtype), ROIS.to(dtype)
    expected = forward(inputs.float(), rois.float(), 2, True)
    assert torch.equal(forward(inputs, rois, 2, True), expected.to(dtype))
    gradient = expected.to(dtype)
    expected = backward(gradient.float(), rois.float(), 2, True)
    assert torch.equal(backward(gradient, rois, 2, True), expected.to(dtype))


def test_pooling_by_maxima_is_refused_with_a_sentence():
    inputs, empty = images(), images().new_zeros(0)
    output = inputs.new_zeros(len(ROIS), 3, *SIZE)
    with pytest.raises(UserError, match="RoIAlign by maxima is not built here"):
        extension.roi_align_forward(inputs, ROIS, output, output, output, **keywords(2, True, pool_mode=0))
    with pytest.raises(UserError, match="RoIAlign by maxima is not built here"):
        extension.roi_align_backward(output, ROIS, empty, empty, inputs, **keywords(2, True, pool_mode=0))


def suppress(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int) -> list[int]:
    """Return the kept indices: by descending score, the earlier of equal ones first, unless it covers a kept box."""
    corners, kept = boxes.tolist(), []

    def area(box):
        return (box[2] - box[0] + offset) * (box[3] - box[1] + offset)

    def iou(a, b):
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
        union = area(a) + area(b) - width * height
        return width * height / union if union else 0.0

    for index in sorted(range(len(corners)), key=lambda index: -scores[index].item()):  # sorted() is stable
        if all(iou(corners[index], corners[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


def random_boxes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes on a grid of pixels, so that overlaps repeat, and scores of five values only, so that most tie."""
    generator = torch.Generator().manual_seed(2)
    corner = torch.randint(0, 24, (count, 2), generator=generator)
    size = torch.randint(0, 12, (count, 2), generator=generator)
    scores = torch.randint(0, 5, (count,), generator=generator) / 4
    return torch.cat([corner, corner + size], dim=1).float(), scores


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_nms_keeps_what_the_definition_keeps_tied_scores_in_their_order(threshold, offset, device):
    boxes, scores = random_boxes(200)
    kept = extension.nms(boxes.to(device), scores.to(device), iou_threshold=threshold, offset=offset)
    assert kept.dtype == torch.int64 and 20 < len(kept) < 180
    assert kept.tolist() == suppress(boxes, scores, threshold, offset)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
def test_nms_of_no_boxes_keeps_none(offset, device):
    none = torch.zeros(0, 4, device=device)
    assert extension.nms(none, none[:, 0], iou_threshold=0.5, offset=offset).shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift, threshold", [(1, 0.6), (3, 1 / 7)])
def test_a_box_whose_overlap_is_the_threshold_itself_is_kept(shift, threshold, dtype, device):
    boxes = torch.tensor([[0.0, 0, 4, 1], [shift, 0, 4 + shift, 1]], dtype=dtype, device=device)
    scores = torch.tensor([0.9, 0.8], dtype=dtype, device=device)
    assert extension.nms(boxes, scores, iou_threshold=threshold, offset=0).tolist() == [0, 1]
    assert extension.nms(boxes, scores, iou_threshold=threshold - 1e-6, offset=0).tolist() == [0]


@pytest.fixture
def lite(monkeypatch):
    """An mmcv without compiled operations, in place of the one that may be installed."""
    package = ModuleType("mmcv")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "mmcv", package)
    monkeypatch.setitem(sys.modules, extension.NAME, None)  # put back at the end, whatever provide_operations does
    monkeypatch.delitem(sys.modules, extension.NAME)


def test_the_stand_in_is_a_module_that_imports_and_has_a_spec(lite):
    assert extension.provide_operations() and extension.provide_operations()
    module = importlib.import_module(extension.NAME)
    spec = importlib.util.find_spec(extension.NAME)
    assert spec is module.__spec__ and spec.name == extension.NAME and spec.origin == extension.__file__
    assert module.nms is extension.nms and module.roi_align_forward is extension.roi_align_forward


def test_another_operation_is_there_for_mmcv_to_import_and_says_its_name_when_it_is_called(lite):
    extension.provide_operations()
    operation = sys.modules[extension.NAME].deform_conv_forward
    with pytest.raises(UserError, match="deform_conv_forward is not built here"):
        operation(torch.zeros(1), stride=1)
    assert not hasattr(sys.modules[extension.NAME], "__wrapped__")


def test_a_built_mmcv_keeps_its_own_operations(lite, monkeypatch):
    built = ModuleType(extension.NAME)
    monkeypatch.setitem(sys.modules, extension.NAME, built)
    assert not extension.provide_operations() and sys.modules[extension.NAME] is built


@pytest.mark.parametrize("content, steps_aside", [("nms = len", True), ("raise ImportError('no symbol')", False)])
def test_a_build_on_disk_is_taken_if_it_loads(lite, tmp_path, caplog, content, steps_aside):
    (tmp_path / "_ext.py").write_text(content)
    sys.modules["mmcv"].__path__ = [str(tmp_path)]
    assert extension.provide_operations() is not steps_aside
    assert (sys.modules[extension.NAME].nms is len) == steps_aside
    assert ("no symbol" in caplog.text) is not steps_aside
