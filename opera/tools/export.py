"""A pre-trained backbone as a file that other libraries load: timm, torchvision, mmdetection and mmsegmentation.

    python -m opera.tools.export --ckpt runs/opera/pretraining/seed0-.../last.ckpt --form timm --out FILE.pth

The file is {"state_dict": ..., "meta": ...}, read with ``weights_only=True``; ``meta["architecture"]`` says what to
build for a strict load:

form         ResNet-50                                       ViT
timm         timm.create_model(model, **arguments), also     the same
             with the file as its ``checkpoint_path``
torchvision  torchvision.models.resnet50, fc an Identity     none: torchvision's ViTs have other names
dense        ResNet of mmdetection and mmsegmentation, by    VisionTransformer of mmsegmentation with these arguments:
             ``init_cfg`` of type Pretrained; the names of   by itself it leaves out the bias of the patches and the
             ``torchvision://resnet50`` without fc           last norm, and has another epsilon

A timm model inside another library (mmsegmentation's TIMMBackbone) needs the form timm.

MoCo-v3's ViT-S has 12 heads, which no tensor shows: built with DeiT-S's 6 it loads strictly and computes something
else. So nothing is written before a network freshly built by the other library computes our features. mmsegmentation
need not be installed: a ViT with its names on torch's own attention replaces it (``DenseViT``).
"""

import argparse
import hashlib
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from opera.backbones import BUILDERS, build_backbone
from opera.moco_checkpoints import encoder_of, is_official, read_state
from shared.claims.compose import row_config
from shared.command_line import Parser
from shared.errors import UserError
from shared.training.checkpoints import AtomicCheckpointIO, load_weights, read_checkpoint

log = logging.getLogger(__name__)

FORMS = ("timm", "torchvision", "dense")
PREFIX = "online.backbone."  # of the backbone's tensors in a pre-training's checkpoint
TIMM_MODELS = {
    "resnet50": "resnet50",
    "vit-small": "vit_small_patch16_224",
    "vit-base": "vit_base_patch16_224",
    "vit-tiny": "vit_tiny_patch16_224",
}
SIZE = 64  # of images where neither row nor tensors tell it: a ResNet takes any
CHECKED_IMAGES, SAME = 4, 1e-9  # relative difference in float64, whose rounding leaves 1e-13
# timm's names of a ViT's parts and mmsegmentation's, in the order in which they are replaced.
DENSE_NAMES = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.", "layers."),
    ("norm1.", "ln1."),
    ("norm2.", "ln2."),
    ("attn.qkv.", "attn.attn.in_proj_"),
    ("attn.proj.", "attn.attn.out_proj."),
    ("mlp.fc1.", "ffn.layers.0.0."),
    ("mlp.fc2.", "ffn.layers.1."),
)


class DenseBlock(nn.Module):
    """A block (B, L, C) -> (B, L, C) by mmsegmentation's names."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, eps: float):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = nn.ModuleDict({"attn": nn.MultiheadAttention(dim, heads, batch_first=True)})
        widened = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU())
        self.ffn = nn.ModuleDict({"layers": nn.Sequential(widened, nn.Linear(mlp_ratio * dim, dim))})

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.ln1(tokens)
        tokens = tokens + self.attn["attn"](rows, rows, rows, need_weights=False)[0]
        return tokens + self.ffn["layers"](self.ln2(tokens))


class DenseViT(nn.Module):
    """Images (B, 3, S, S) -> class token (B, C): what mmsegmentation 1.2's VisionTransformer of these arguments has."""

    def __init__(self, img_size, patch_size, embed_dims, num_layers, num_heads, mlp_ratio, norm_cfg, **implied):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dims))
        projection = nn.Conv2d(3, embed_dims, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"projection": projection})
        eps = norm_cfg["eps"]
        self.layers = nn.Sequential(*(DenseBlock(embed_dims, num_heads, mlp_ratio, eps) for _ in range(num_layers)))
        self.ln1 = nn.LayerNorm(embed_dims, eps)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["projection"](images).flatten(2).transpose(1, 2)  # (B, L, C)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        return self.ln1(self.layers(tokens))[:, 0]


def dense_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT's tensors by mmsegmentation's names from those by timm's."""
    renamed = {}
    for name, value in state.items():
        for timms, theirs in DENSE_NAMES:
            name = name.replace(timms, theirs)
        renamed[f"ln1.{name.removeprefix('norm.')}" if name.startswith("norm.") else name] = value
    return renamed


def architecture(name: str, backbone: nn.Module, form: str) -> dict[str, Any]:
    """Return what the other library has to build: its name, the network's and its arguments.

    Raises UserError for an unknown form, and where the form has no such network.
    """
    if form not in FORMS:
        raise UserError(f"form={form} is unknown: choose one of {', '.join(FORMS)}")
    if name not in TIMM_MODELS:
        raise UserError(
            f"{name} is a network of our own, which no other library builds: load it with opera.backbones, or "
            f"export one of {', '.join(TIMM_MODELS)}"
        )
    if name == "resnet50":
        return {
            "timm": {"library": "timm", "model": "resnet50", "arguments": {"num_classes": 0}},
            "torchvision": {"library": "torchvision", "model": "resnet50", "replaced": {"fc": "Identity"}},
            "dense": {"library": "mmdet, mmseg", "model": "ResNet", "arguments": {"depth": 50, "style": "pytorch"}},
        }[form]
    if form == "torchvision":
        raise UserError(
            f"{name} has no form torchvision, whose ViTs have other names: choose timm, or dense for mmsegmentation"
        )
    block, patches = backbone.blocks[0], backbone.patch_embed
    sizes = {"img_size": patches.img_size[0], "patch_size": patches.patch_size[0]}
    depth, heads = len(backbone.blocks), block.attn.num_heads
    if form == "timm":
        sizes |= {"embed_dim": backbone.embed_dim, "depth": depth, "num_heads": heads, "num_classes": 0}
        return {"library": "timm", "model": TIMM_MODELS[name], "arguments": sizes}
    sizes |= {"embed_dims": backbone.embed_dim, "num_layers": depth, "num_heads": heads}
    sizes |= {"mlp_ratio": block.mlp.fc1.out_features // backbone.embed_dim, "patch_bias": True}
    sizes |= {"final_norm": True, "norm_cfg": {"type": "LN", "eps": block.norm1.eps}}
    return {"library": "mmseg", "model": "VisionTransformer", "arguments": sizes}


def foreign_network(described: dict[str, Any]) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """Return the other library's network, untrained, and what makes (B, C) features of its output."""
    if described["library"] == "timm":
        return timm.create_model(described["model"], **described["arguments"]), lambda features: features
    if described["library"] == "mmseg":
        return DenseViT(**described["arguments"]), lambda features: features
    network = torchvision.models.resnet50()
    if described["library"] == "torchvision":
        network.fc = nn.Identity()
        return network, lambda features: features
    maps = create_feature_extractor(network, {"layer4": "map"})  # has no fc, as a detector's backbone
    return maps, lambda outputs: outputs["map"].mean((2, 3))


@torch.no_grad()
def require_same_features(backbone: nn.Module, state: dict[str, Tensor], described: dict, size: int) -> None:
    """Raise UserError unless the other library's network with this state computes our features, in float64."""
    remedy = "install the versions of requirements.lock (make setup) and export again"
    network, features = foreign_network(described)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{described['library']} has other names or shapes ({reason}): {remedy}") from error
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(CHECKED_IMAGES, 3, size, size, generator=generator, dtype=torch.float64)
    ours = backbone.double().eval()(images)
    theirs = features(network.double().eval()(images))
    if not ours.isfinite().all():
        raise UserError("the features of this checkpoint are not finite: its training diverged, train it again")
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    if not difference <= SAME:  # NaN as well
        raise UserError(
            f"{described['library']}'s network computes other features than ours (difference {difference:.1e}): "
            f"{remedy}"
        )


def backbone_state(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Return the online backbone's tensors and the steps trained, which an official file of MoCo-v3 does not tell.

    Raises UserError where the file is not that of a pre-training.
    """
    if is_official(path):
        official = read_state(path)
        return {ours: official[name] for ours, name in encoder_of(official, path)[1].items()}, None
    state, steps = read_checkpoint(path)
    backbone = {k.removeprefix(PREFIX): value for k, value in state.items() if k.startswith(PREFIX)}
    if not backbone:
        kind = "a tuned classifier's" if "head.weight" in state else "another network's"
        raise UserError(f"{path} is {kind} checkpoint: give the last.ckpt of a pre-training (runs/opera/pretraining)")
    return backbone, steps


def recognised(state: dict[str, Tensor], path: Path) -> tuple[str, int | None]:
    """Return the backbone whose names and shapes the tensors have, and its image size where they tell it."""
    size, positions = None, state.get("pos_embed")
    patches = state.get("patch_embed.proj.weight")
    if positions is not None and patches is not None and positions.ndim == 3:
        size = math.isqrt(max(positions.shape[1] - 1, 1)) * patches.shape[-1]
    shapes = {name: value.shape for name, value in state.items()}
    for name in BUILDERS:
        with torch.device("meta"):
            own = build_backbone(name, size or SIZE).state_dict()
        if shapes == {key: value.shape for key, value in own.items()}:
            return name, size
    raise UserError(f"{path} holds none of the backbones {', '.join(BUILDERS)}: give the checkpoint of one of them")


def export(path: Path, form: str, out: Path, row: str | None = None, force: bool = False) -> dict[str, Any]:
    """Write the online backbone of a pre-training's checkpoint for another library; returns the file's ``meta``.

    meta: source_sha256, row, form, backbone, architecture, steps_trained; image_size in pixels, mean and std of RGB in
    [0, 1]. Without a row the tensors identify the backbone, and what they do not show is None. Raises UserError,
    with nothing written, for a file that is there already (unless ``force``), one that is no checkpoint of a
    pre-training or does not fit the row, a form that has no such network, and one that would compute something else.
    """
    path, out = Path(path), Path(out)
    if out.is_dir() or (out.exists() and not force):
        raise UserError(f"{out} is there already: give another name with --out, or --force to replace a file")
    state, steps = backbone_state(path)
    if out.exists() and out.samefile(path):
        raise UserError(f"{out} is the checkpoint itself: give another name with --out")
    mean = std = None
    if row is None:
        name, size = recognised(state, path)
    else:
        cfg = row_config("opera", row, 0)
        name, size = cfg.model.backbone, cfg.data.image_size
        mean, std = (OmegaConf.to_container(values) for values in (cfg.views.mean, cfg.views.std))
    backbone = build_backbone(name, size or SIZE)
    load_weights(backbone, state, row or f"of {name}", path)
    described = architecture(name, backbone, form)
    # Training keeps convolutions with their channels side by side.
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    if described["library"] == "mmseg":
        state = dense_names(state)
    require_same_features(backbone, state, described, size or SIZE)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    meta = {"source_sha256": digest, "row": row, "form": form, "backbone": name, "architecture": described}
    meta |= {"image_size": size, "mean": mean, "std": std, "steps_trained": steps}
    try:
        AtomicCheckpointIO().save_checkpoint({"state_dict": state, "meta": meta}, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another place with --out") from error
    return meta


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m opera.tools.export", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="last.ckpt of a pre-training, or MoCo-v3's")
    parser.add_argument("--form", choices=FORMS, required=True, help="who is to load it")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--row", help="the row that it was pre-trained for: tells image size, mean and deviation")
    parser.add_argument("--force", action="store_true", help="replace the file where it is there already")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Export one checkpoint and return the exit code: 0, or 2 after one sentence on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options = parse(arguments)
        meta = export(options.ckpt, options.form, options.out, options.row, options.force)
    except UserError as error:
        log.error("%s", error)
        return 2
    log.info("%s: %s, to be built as %s", options.out, meta["backbone"], meta["architecture"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
