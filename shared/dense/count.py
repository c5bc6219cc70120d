"""What a detector or a segmenter costs, with nothing computed: parameters, FLOPs and the memory of its training.

Tensors have no data here, so what data decide is a number: a detector's heads take as many regions as there can be.

FLOPs are of what mmdet's and mmseg's own counters run (``tools/analysis_tools/get_flops.py``), by which published
tables are made: a detector's backbone, neck, RPN, box head on all proposals and mask head on the first 100 of them
(``StandardRoIHead.forward``); a segmenter's backbone, neck and decode head (``EncoderDecoder._forward``), while its
auxiliary head is in the parameters alone.
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
MOMENTS = {"adamw": 2, "sgd": 1}  # numbers that an optimiser keeps of a parameter
ELSEWHERE = ("pretraining", "weights", "ratios")  # keys of ``dense`` that change no cost
COLUMNS = ["rows", "base file", "M", "G", "images on a device", "GiB for backward", "GiB of weights and optimiser"]


def on_meta(dense, backbone: nn.Module):
    """Return a row's model without data, around a backbone that has none either, and its mmengine config."""
    library = library_of(dense)
    config = config_of(library, dense, backbone.channels)
    with torch.device("meta"):
        model = library.build(config.model)
    model.backbone = backbone
    return with_global_batchnorm(model), config


def run_regions(roi_head: nn.Module, boxes: int, masks: int) -> None:
    """Run the box head on so many regions and the mask head on so many, of one image or of several."""
    for part, regions in (("bbox", boxes), ("mask", masks)):
        extractor = getattr(roi_head, f"{part}_roi_extractor")
        shape = (regions, extractor.out_channels, *extractor.roi_layers[0].output_size)
        getattr(roi_head, f"{part}_head")(torch.empty(shape, device="meta", requires_grad=torch.is_grad_enabled()))


def counted_call(dense, backbone: nn.Module) -> tuple[int, Callable[[], object]]:
    """Return the number of parameters of a row's model, and what runs the operations that count for an image."""
    model = on_meta(dense, backbone)[0].eval()
    image = torch.empty(1, 3, *COUNTED[dense.kind], device="meta")

    def detect() -> None:
        model.rpn_head(model.extract_feat(image))
        run_regions(model.roi_head, model.test_cfg.rpn.max_per_img, MASKS)

    return parameters_of(model), detect if dense.kind == "detection" else lambda: model(image, mode="tensor")


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps of a call, each storage once, without the model's parameters and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later one has its address
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        call()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def memory_of(cfg, backbone: nn.Module) -> dict[str, int]:
    """Return what a device holds in a training step in float32, without activation checkpointing, and of which images.

    Keys: images, height, width; kept_bytes, for the backward pass; state_bytes: weights, gradients, optimiser. A
    detector's losses, which are small beside its maps, are left out; a segmenter's are of every pixel and class.
    """
    dense = cfg.dense
    model, config = on_meta(dense, backbone)
    images = -(-dense.optim.batch_size // (cfg.trainer.devices * cfg.trainer.num_nodes))
    if dense.kind == "detection":
        scale = next(step.scale for step in config.test_dataloader.dataset.pipeline if step.type == "Resize")
        size = tuple(-(-side // 32) * 32 for side in sorted(scale))  # padded, as mmdet does
    else:
        size = tuple(model.data_preprocessor.size)
    inputs = torch.empty(images, 3, *size, device="meta")

    def detect() -> None:
        boxes, sampler = images * model.train_cfg.rcnn.sampler.num, model.train_cfg.rcnn.sampler
        model.rpn_head(model.extract_feat(inputs))
        run_regions(model.roi_head, boxes, int(boxes * sampler.pos_fraction))

    def segment() -> None:
        maps, labels = model.extract_feat(inputs), torch.empty(images, *size, dtype=torch.int64, device="meta")
        for head in (model.decode_head, model.auxiliary_head):
            F.cross_entropy(F.interpolate(head(maps), size, mode="bilinear"), labels)

    kept = kept_bytes(model.train(), detect if dense.kind == "detection" else segment)
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
    for cfg, *others in lines.values():
        counts, held = count(cfg), memory(cfg)
        numbers = (counts["parameters"] / 1e6, counts["flops"] / 1e9)
        gib = (held[name] / 2**30 for name in ("kept_bytes", "state_bytes"))
        rows, base = "<br>".join(same.row for same in (cfg, *others)), cfg.dense.base.partition("::")[2]
        sizes = f"{held['images']} of {held['height']} x {held['width']}"
        cells.append([rows, base, *(f"{n:.1f}" for n in numbers), sizes, *(f"{n:.1f}" for n in gib)])
    return cells
