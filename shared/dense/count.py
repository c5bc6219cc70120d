"""What a detector or a segmenter costs, with nothing computed: parameters, FLOPs and the memory of its training.

Tensors have no data here, so what data decide is a number: a detector's heads take as many regions as there can be.

FLOPs are those that mmdet's and mmseg's own counters see (``tools/analysis_tools/get_flops.py``), by which published
tables are made: a detector's backbone, neck, RPN, box head on all proposals and mask head on the first 100 of them
(``StandardRoIHead.forward``); a segmenter's backbone, neck and decode head (``EncoderDecoder._forward``), while its
auxiliary head counts in the parameters alone.
"""

from collections.abc import Callable, Iterable

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from shared.dense.model import config_of, library_of
from shared.dense.run import parameters_of
from shared.training.ranks import with_global_batchnorm

COUNTED = {"detection": (800, 1280), "segmentation": (512, 2048)}  # height and width in pixels of published counts
MASKS = 100  # regions of the mask head in mmdet's counter
LARGEST = (800, 1344)  # images of a detector in training: at most 800 x 1333, padded to multiples of 32
MOMENTS = {"adamw": 2, "sgd": 1}  # numbers that an optimiser keeps of a parameter
ELSEWHERE = ("pretraining", "weights", "ratios")  # keys of ``dense`` that change no cost
COLUMNS = [
    "rows",
    "base file",
    "M",
    "G",
    "images on a device",
    "GiB kept for backward",
    "GiB of weights, gradients, optimiser",
]


def on_meta(dense, backbone: nn.Module) -> nn.Module:
    """Return the model of a row, without data, around a backbone that has none either."""
    library = library_of(dense)
    with torch.device("meta"):
        model = library.build(config_of(library, dense, backbone.channels).model)
    model.backbone = backbone
    return with_global_batchnorm(model)


def run_regions(roi_head: nn.Module, boxes: int, masks: int) -> None:
    """Run the box head on so many regions and the mask head on so many, of one image or of several."""
    heads = ((roi_head.bbox_roi_extractor, roi_head.bbox_head, boxes),)
    for extractor, head, count in (*heads, (roi_head.mask_roi_extractor, roi_head.mask_head, masks)):
        size = extractor.roi_layers[0].output_size
        head(torch.empty(count, extractor.out_channels, *size, device="meta", requires_grad=torch.is_grad_enabled()))


def counted_call(dense, backbone: nn.Module) -> tuple[int, Callable[[], object]]:
    """Return the number of parameters of a row's model, and what runs of it the operations that count for an image."""
    model = on_meta(dense, backbone).eval()
    image = torch.empty(1, 3, *COUNTED[dense.kind], device="meta")

    def detect() -> None:
        maps = model.extract_feat(image)
        model.rpn_head(maps)
        run_regions(model.roi_head, model.test_cfg.rpn.max_per_img, MASKS)

    def segment() -> None:
        model(image, mode="tensor")

    return parameters_of(model), detect if dense.kind == "detection" else segment


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps of a call, each storage once, without the model's parameters and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later one has its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        call()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def memory_of(cfg, backbone: nn.Module) -> dict[str, int]:
    """Return what a device holds in a training step in float32, without activation checkpointing, and of which images.

    Keys: images, height, width; kept_bytes, for the backward pass; state_bytes: weights, gradients, optimiser. A
    detector's losses, which are small beside its maps, are left out; a segmenter's are of every pixel and class.
    """
    dense = cfg.dense
    model = on_meta(dense, backbone).train()
    images = -(-dense.optim.batch_size // (cfg.trainer.devices * cfg.trainer.num_nodes))
    size = LARGEST if dense.kind == "detection" else tuple(model.data_preprocessor.size)
    inputs = torch.empty(images, 3, *size, device="meta")

    def detect() -> None:
        sampler = model.train_cfg.rcnn.sampler
        model.rpn_head(model.extract_feat(inputs))
        run_regions(model.roi_head, images * sampler.num, int(images * sampler.num * sampler.pos_fraction))

    def segment() -> None:
        maps, labels = model.extract_feat(inputs), torch.empty(images, *size, dtype=torch.int64, device="meta")
        for head in (model.decode_head, model.auxiliary_head):
            F.cross_entropy(F.interpolate(head(maps), size, mode="bilinear"), labels)

    kept = kept_bytes(model, detect if dense.kind == "detection" else segment)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    state = held + (1 + MOMENTS[dense.optim.name]) * trained
    return {"images": images, "height": size[0], "width": size[1], "kept_bytes": kept, "state_bytes": state}


def cost_cells(cfgs: Iterable, count: Callable, memory: Callable) -> list[list[str]]:
    """Return the cells under COLUMNS; rows of one network and recipe are one line, counted and measured once."""
    lines: dict[str, list] = {}
    for cfg in cfgs:
        dense = {name: value for name, value in cfg.dense.items() if name not in ELSEWHERE}
        key = OmegaConf.to_yaml({"model": cfg.model, "dense": dense, "devices": cfg.trainer.devices})
        lines.setdefault(key, []).append(cfg)
    cells = []
    for same in lines.values():
        counts, held = count(same[0]), memory(same[0])
        sizes = f"{held['images']} of {held['height']} x {held['width']}"
        numbers = [counts["parameters"] / 1e6, counts["flops"] / 1e9]
        gib = [f"{held[name] / 2**30:.1f}" for name in ("kept_bytes", "state_bytes")]
        rows, base = "<br>".join(cfg.row for cfg in same), same[0].dense.base.partition("::")[2]
        cells.append([rows, base, *(f"{number:.1f}" for number in numbers), sizes, *gib])
    return cells
