"""mmdet's and mmseg's models with a backbone of ours: built from their config file, for any image size.

A backbone is a module with ``channels``, the widths of its maps, from images (B, 3, H, W) to as many maps; a paper's
``detection`` and ``segmentation`` rooms make them of its own networks.
"""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from shared.dense.libraries import Library, detection, segmentation
from shared.dense.sources import source_of
from shared.training.ranks import with_global_batchnorm

PLACE = {"_delete_": True, "type": "torch.nn.Identity"}  # where our backbone will be


class Padded(nn.Module):
    """Images (B, 3, H, W) of any size -> maps: padded with zeros to multiples of ``unit``, the maps cut back.

    ``strides``: pixels a cell of every map; a map is cut to H / stride, rounded up.
    """

    def __init__(self, network: nn.Module, unit: int, channels: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.network, self.unit, self.channels, self.strides = network, unit, tuple(channels), tuple(strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.unit, 0, -height % self.unit))
        maps = zip(self.network(padded), self.strides, strict=True)
        return tuple(grid[:, :, : -(-height // stride), : -(-width // stride)].contiguous() for grid, stride in maps)


def library_of(dense) -> Library:
    """Return mmdet or mmseg, imported; UserError where they are not installed."""
    return detection() if dense.kind == "detection" else segmentation()


def classes_of(dense) -> int:
    """Return the number of classes of a row's data set."""
    source = source_of(dense)
    if source.classes is not None:
        return len(source.classes)
    return len(library_of(dense).registry.DATASETS.get(source.type).METAINFO["classes"])


def _with_tuples(value: Any) -> Any:
    """Return what YAML gave with tuples of numbers, which the libraries ask for, in the place of lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(part) for key, part in value.items()}
    if isinstance(value, list):
        parts = [_with_tuples(part) for part in value]
        return tuple(parts) if all(isinstance(part, int | float) for part in parts) else parts
    return value


def config_of(library: Library, dense, channels: Sequence[int]):
    """Return mmengine's config of ``dense.base`` with the row's changes, classes and widths of the backbone's maps."""
    changes = {"model.backbone": PLACE} | _with_tuples(OmegaConf.to_container(dense.changes))
    config = library.config(dense.base, changes)
    config.model.pop("pretrained", None)  # mmseg's place for the backbone's weights
    classes, model = classes_of(dense), config.model
    if dense.kind == "detection":
        model.neck.in_channels = list(channels)
        for head in (model.roi_head.bbox_head, model.roi_head.mask_head):
            head.num_classes = classes
        return config
    if model.get("neck"):
        model.neck.in_channels, model.neck.out_channels = list(channels), channels[-1]
        channels = [channels[-1]] * len(channels)
    for head in (model.decode_head, model.auxiliary_head):
        several = isinstance(head.in_index, list | tuple)
        head.in_channels = [channels[i] for i in head.in_index] if several else channels[head.in_index]
        head.num_classes = classes
    return config


def build_model(library: Library, config, backbone: nn.Module) -> nn.Module:
    """Return the library's model, its heads drawn anew, on ``backbone``; batch statistics are those of all ranks."""
    model = library.build(config.model)
    model.init_weights()
    model.backbone = backbone
    return with_global_batchnorm(model)
