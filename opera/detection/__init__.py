"""ResNets as backbones of Mask R-CNN (trained by ``shared/dense``): four stages, batch statistics as pre-trained."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shared.dense.model import Padded

STAGES = ("layer1", "layer2", "layer3", "layer4")


class Stages(nn.Module):
    """Images (B, 3, H, W) -> the outputs (B, C, h, w) of a ResNet's four stages.

    ``frozen_stages``: so many parts, the stem first, stay as they are, without a gradient. ``norm_eval``: batch norms
    use, and keep, the statistics of the pre-training, while their weights are trained. Both as in mmdet.
    """

    def __init__(self, network: nn.Module, frozen_stages: int = 0, norm_eval: bool = False):
        super().__init__()
        self.network, self.norm_eval = network, norm_eval
        stem = [network.conv1, network.bn1]
        stages = [[getattr(network, name)] for name in STAGES]
        # mmdet counts the stem with its first stage.
        self.frozen = [part for parts in [stem, *stages][: frozen_stages + 1 if frozen_stages else 0] for part in parts]
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        for layer in self.modules() if self.norm_eval else ():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        network = self.network
        grid = network.maxpool(network.act1(network.bn1(network.conv1(images))))
        maps = []
        for name in STAGES:
            grid = getattr(network, name)(grid)
            maps.append(grid)
        return maps


def resnet_maps(network: nn.Module, frozen_stages: int = 0, norm_eval: bool = False, dilated: bool = False) -> Padded:
    """Return a timm ResNet as a backbone; ``dilated``: its last two stages keep the grid of the second."""
    channels = [stage["num_chs"] for stage in network.feature_info[1:]]  # behind the stem
    first = network.conv1.stride[0] * (1 if isinstance(network.maxpool, nn.Identity) else 2)
    strides = [first, 2 * first, *([2 * first] * 2 if dilated else [4 * first, 8 * first])]
    if dilated:
        for name, dilation in zip(STAGES[2:], (2, 4), strict=True):
            dilate(getattr(network, name), dilation)
    return Padded(Stages(network, frozen_stages, norm_eval), 1, channels, strides)


def dilate(stage: nn.Module, dilation: int) -> None:
    """Take the step of two out of a stage of bottlenecks and widen its 3 x 3 convolutions, the first half as much."""
    for number, block in enumerate(stage):
        wide = dilation if number else dilation // 2
        block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (wide, wide), (wide, wide)
        for layer in block.downsample or ():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
