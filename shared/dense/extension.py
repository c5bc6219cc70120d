"""A stand-in for ``mmcv._ext``, the compiled operations of mmcv, over torchvision.

mmcv-lite is mmcv without that module, and ``mmcv.ops``, which mmdet imports, does not import without it. A Mask R-CNN
or a UPerNet calls two of its operations, NMS and RoIAlign by averages, which torchvision has on the CPU and on CUDA.
The functions here take the arguments that ``mmcv/ops/nms.py`` and ``mmcv/ops/roi_align.py`` of mmcv 2.1.0 pass and
write where the C++ writes (``mmcv/ops/csrc/pytorch``); every other operation raises when it is called.

Half precision: mmdet casts boxes to the type of the feature maps, and bfloat16 holds a coordinate near 1000 to 4 pixels
only. The arithmetic here is at least of float32, but it cannot bring back what that cast loses.
"""

import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torchvision
from torch import Tensor

from shared.errors import UserError

logger = logging.getLogger(__name__)

NAME = "mmcv._ext"
AVERAGE = 1  # mmcv's pool_mode; 0 is the maximum


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the (K,) int64 indices of the boxes that greedy suppression keeps, by descending score.

    ``bboxes`` (N, 4) are x1, y1, x2, y2 in pixels, of width x2 - x1 + ``offset``; ``scores`` (N,). A box goes where its
    IoU with a kept one is above the threshold. Of equal scores the first comes first.
    """
    dtype = torch.promote_types(bboxes.dtype, torch.float32)
    corners = bboxes.to(dtype)
    if offset:
        corners = torch.cat([corners[:, :2], corners[:, 2:] + offset], dim=1)
    # As the C++ does, compare in the boxes' own precision: an IoU of 3 / 5 in single precision is above a double 0.6.
    threshold = torch.tensor(iou_threshold, dtype=dtype).item()
    return torchvision.ops.nms(corners, scores.to(dtype), threshold)


def _require_average(pool_mode: int) -> None:
    if pool_mode != AVERAGE:
        raise UserError(
            "RoIAlign by maxima is not built here, only by averages: give pool_mode='avg', or install a built mmcv"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write RoIAlign of ``input`` (N, C, H, W) at ``rois`` (R, 5) into ``output`` (R, C, height, width).

    A row of ``rois`` is an image's index and x1, y1, x2, y2 in pixels, which ``spatial_scale`` turns into the map's.
    ``sampling_ratio`` points a side of a bin are averaged, with 0 as many as the bin is wide, rounded up. ``aligned``
    shifts boxes by half a pixel. ``argmax_*`` belong to pooling by maxima, which raises UserError.
    """
    _require_average(pool_mode)
    dtype = torch.promote_types(input.dtype, torch.float32)
    size = (aligned_height, aligned_width)
    pooled = torchvision.ops.roi_align(
        input.to(dtype), rois.to(dtype), size, spatial_scale, sampling_ratio, bool(aligned)
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient with respect to ``input`` of ``roi_align_forward`` into ``grad_input`` (N, C, H, W)."""
    _require_average(pool_mode)
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    backward = torch.ops.torchvision._roi_align_backward
    gradient = backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        bool(aligned),
    )
    grad_input.copy_(gradient)


class _Extension(ModuleType):
    """A module in which every public name is an operation; mmcv asks for all of them while it is imported."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def not_built(*arguments, **keywords):
            raise UserError(
                f"mmcv's operation {name} is not built here, only NMS and RoIAlign by averages are: "
                "take a model without it, or install a built mmcv"
            )

        return not_built


def provide_operations() -> bool:
    """Make ``import mmcv.ops`` work, once; return whether the stand-in is in use, False beside a built mmcv."""
    module = sys.modules.get(NAME)
    if module is None:
        try:
            import mmcv._ext as module
        except ModuleNotFoundError:
            pass
        except ImportError as error:  # built for another torch, say
            logger.warning("mmcv's compiled operations do not load, torchvision's take their place: %s", error)
    if module is None:
        module = _Extension(NAME, __doc__)
        # importlib.util.find_spec raises for a loaded module without a spec.
        module.__spec__ = ModuleSpec(NAME, loader=None, origin=__file__)
        module.__file__ = __file__
        module.nms, module.roi_align_forward, module.roi_align_backward = nms, roi_align_forward, roi_align_backward
        sys.modules[NAME] = module
    return isinstance(module, _Extension)
