"""Official checkpoints of MoCo-v3 (https://github.com/facebookresearch/moco-v3) in our backbones.

A file is {"state_dict": {...}, "arch": ..., "epoch": ..., "optimizer": ...} as its training saved it, each name behind
DistributedDataParallel's ``module.``:

pre-training    module.base_encoder.*, module.momentum_encoder.*, module.predictor.*
linear probe    module.*, the encoder as it was pre-trained and a classifier

The encoder is torchvision's ResNet-50 or timm's ViT; projector or classifier sit in its ``fc`` or ``head`` and are left
out. Positions are read from the file: in those of MoCo-v3 rows and columns are the other way round than in ours, which
is another order of channels. OPERA's own release has the same form. Read with ``weights_only=True``.
"""

import logging
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from shared.errors import UserError
from shared.training.checkpoints import read_file

log = logging.getLogger(__name__)

WRAPPER = "module."
ENCODERS = ("base_encoder.", "momentum_encoder.")  # the first one that a file has is used
ENDS = ("fc.", "head.")  # of an encoder: projector or classifier


class Loaded(NamedTuple):
    """The tensors of a file by their names there: those that the backbone has now, and the others."""

    encoder: str  # "base_encoder", "momentum_encoder", or "" of a linear probe
    used: list[str]
    left_out: list[str]


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a MoCo-v3 file by their names there; UserError for a missing, damaged or other file."""
    remedy = (
        "give an official file of MoCo-v3, fetched again where it is cut short; of a file that you trust and that "
        "holds more than tensors, save {'state_dict': ...} alone"
    )
    content = read_file(path, remedy)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state_dict of tensors: {remedy}")
    return state


def is_official(path: Path) -> bool:
    """Return whether a file has tensors by MoCo-v3's names; UserError for a missing or damaged one."""
    content = read_file(path, "give the last.ckpt of a run, or an official file of MoCo-v3")
    state = content.get("state_dict") if isinstance(content, dict) else None
    return isinstance(state, dict) and any(str(name).startswith(WRAPPER) for name in state)


def encoder_of(state: dict[str, Tensor], path: Path) -> tuple[str, dict[str, str]]:
    """Return which encoder is used and, by our names, the names in the file; UserError where there is none."""
    for encoder in ENCODERS:
        prefix = WRAPPER + encoder
        if any(name.startswith(prefix) for name in state):
            return encoder.rstrip("."), _without_end(state, prefix)
    if not any(name.startswith(WRAPPER) for name in state):
        raise UserError(
            f"{path} has no tensors named {WRAPPER}*, as MoCo-v3 saves them: give the file as it was published, not a "
            "converted one"
        )
    return "", _without_end(state, WRAPPER)


def _without_end(state: dict[str, Tensor], prefix: str) -> dict[str, str]:
    names = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
    return {ours: name for ours, name in names.items() if not ours.startswith(ENDS)}


def require_fit(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise UserError unless the tensors (by our names) are all of the backbone's, in shape as well."""
    own = backbone.state_dict()
    positions = [tensors["pos_embed"].shape for tensors in (own, state) if "pos_embed" in tensors]
    unfit = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    )
    if unfit == ["pos_embed"] and [len(shape) for shape in positions] == [3, 3]:
        raise UserError(
            f"{path} has {positions[1][1] - 1} patches and the backbone {positions[0][1] - 1}: set data.image_size to "
            "that of the file (224 in the official ones)"
        )
    if unfit:
        kind = "a ViT" if "pos_embed" in state else "a ResNet" if "layer1.0.conv1.weight" in state else "a network"
        raise UserError(
            f"{path} holds {kind} of another architecture than the backbone: {len(unfit)} tensors are missing, unknown "
            f"or of another shape, such as {unfit[0]}; set model.backbone to resnet50, vit-small or vit-base, as the "
            "file's name says"
        )


def load_moco_v3(backbone: nn.Module, path: str | Path) -> Loaded:
    """Put the encoder of an official MoCo-v3 file into ``backbone``, and return which tensors were loaded.

    Of a pre-training that is the base encoder, which its own evaluation uses, or the momentum encoder where a file
    has that one alone. ``backbone``: ``build_backbone("resnet50" | "vit-small" | "vit-base", 224)``; for the ViT-S the
    12 heads are the backbone's, no tensor shows them. Raises UserError, with the backbone as it was, for a missing or
    damaged file, one that is not MoCo-v3's, and one of another architecture or image size.
    """
    path = Path(path)
    state = read_state(path)
    encoder, names = encoder_of(state, path)
    weights = {ours: state[name] for ours, name in names.items()}
    require_fit(backbone, weights, path)
    backbone.load_state_dict(weights)
    left_out = sorted(state.keys() - set(names.values()))
    loaded = Loaded(encoder, sorted(names.values()), left_out)
    kinds = sorted({".".join(name.split(".")[:2]) for name in left_out})
    log.info(
        "%s: %d tensors of %s loaded, %d left out (%s)",
        path.name,
        len(loaded.used),
        encoder or "a linear probe's encoder",
        len(left_out),
        ", ".join(kinds) or "none",
    )
    return loaded


def linear_classifier(path: str | Path) -> dict[str, Tensor] | None:
    """Return weight (classes, C) and bias (classes,) of a linear probe's classifier; None where the file has none."""
    state = read_state(Path(path))
    if any(name.startswith(WRAPPER + encoder) for encoder in ENCODERS for name in state):
        return None
    for end in ENDS:
        classifier = {name: state.get(f"{WRAPPER}{end}{name}") for name in ("weight", "bias")}
        if all(value is not None for value in classifier.values()):
            return classifier
    return None
