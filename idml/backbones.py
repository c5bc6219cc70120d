"""Backbones: images (B, 3, H, W) -> maps (B, C, h, w), C = ``num_features``.

ResNet-50 is the paper's (arXiv 2205.04449), the two small ones are ours, for training from scratch on a CPU. Nothing
is fetched: pretrained weights come from a file that the user names, timm's or torchvision's own.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from shared.errors import UserError
from shared.training.checkpoints import read_file

STAGE_WIDTHS = (32, 64, 128, 256)
TINY_WIDTHS = (32, 48, 64)
CLASSIFIER = "fc."  # first part of the names that a backbone has no use for
COUNTER = ".num_batches_tracked"  # torchvision's older files lack it, and evaluation does not read it
REMEDY = "give timm's or torchvision's resnet50 as .safetensors or as a .pth that holds its state dict alone"


def normed(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels)]


def draw(backbone: nn.Module) -> None:
    """Draw every convolution by Kaiming's rule over its outputs, as ResNet-50's are."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNetSmall(nn.Sequential):
    """A stem of stride 2, then four stages of one basic block: (B, 3, H, W) -> (B, 256, H / 16, W / 16).

    1,226,400 parameters; 63.8 million multiply-adds for an image of 64 x 64.
    """

    num_features = STAGE_WIDTHS[-1]

    def __init__(self):
        stem = nn.Conv2d(3, STAGE_WIDTHS[0], 3, stride=2, padding=1, bias=False)
        layers = [*normed(stem), nn.ReLU(inplace=True), BasicBlock(STAGE_WIDTHS[0], STAGE_WIDTHS[0])]
        for narrow, wide in pairwise(STAGE_WIDTHS):
            shortcut = nn.Sequential(*normed(nn.Conv2d(narrow, wide, 1, stride=2, bias=False)))
            layers.append(BasicBlock(narrow, wide, stride=2, downsample=shortcut))
        super().__init__(*layers)
        draw(self)


class ConvNetTiny(nn.Sequential):
    """Three convolutions for digits of 8 x 8: (B, 3, H, W) -> (B, 64, H / 2, W / 2).

    42,624 parameters; 0.72 million multiply-adds for an image of 8 x 8.
    """

    num_features = TINY_WIDTHS[-1]

    def __init__(self):
        layers = []
        for narrow, wide, stride in zip((3, *TINY_WIDTHS), TINY_WIDTHS, (1, 2, 1), strict=False):
            layers += [*normed(nn.Conv2d(narrow, wide, 3, stride=stride, padding=1, bias=False)), nn.ReLU()]
        super().__init__(*layers)
        draw(self)


def resnet50() -> nn.Module:
    """Return timm's ResNet-50 without pooling and classifier, 23,508,032 parameters.

    Every batch norm begins at scale 1, as in the release's classification and not as timm's own default, which sets the
    last one of a block to 0.
    """
    return timm.create_model("resnet50", pretrained=False, num_classes=0, global_pool="", zero_init_last=False)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": resnet50,
    "resnet-small": ResNetSmall,
    "convnet-tiny": ConvNetTiny,
}


def build_backbone(name: str, weights_path: str | Path | None = None) -> nn.Module:
    """Build a backbone, with the weights of a file where one is named, else untrained.

    Raises UserError for an unknown name, for a file that does not hold the weights of a ResNet-50, and for a file for
    another backbone.
    """
    if name not in BUILDERS:
        raise UserError(f"model.backbone={name} is unknown: choose one of {', '.join(BUILDERS)}")
    if weights_path is not None and name != "resnet50":
        raise UserError(
            f"{weights_path} cannot be used: weights are read for resnet50 alone, {name} trains from scratch; name no "
            "file"
        )
    state = None if weights_path is None else read_weights(Path(weights_path))
    backbone = BUILDERS[name]()
    if state is not None:
        load_pretrained(backbone, state, weights_path)
    return backbone


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or a PyTorch file, read as data only; UserError for any other."""
    if path.suffix != ".safetensors":
        state = read_file(path, REMEDY)
    else:
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}): {REMEDY}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict: {REMEDY}")
    return state


def load_pretrained(backbone: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict without its classifier; UserError where a tensor is missing, unknown or of another shape."""
    own = backbone.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIER)}
    for name in own.keys() - state.keys():
        if name.endswith(COUNTER):
            state[name] = torch.zeros_like(own[name])
    # A deeper ResNet holds all that this one asks for: what is too much must be refused as well.
    unfit = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    )
    if unfit:
        raise UserError(
            f"{path} is no ResNet-50: {len(unfit)} tensors are missing, unknown or of another shape, such as "
            f"{unfit[0]}; {REMEDY}"
        )
    backbone.load_state_dict(state)
