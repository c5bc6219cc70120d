"""PyramidNet for images of 32 x 32, the network of the paper's CIFAR rows: depth 200, alpha 240.

D. Han, J. Kim, J. Kim, "Deep Pyramidal Residual Networks", arXiv 1610.02915: every block is wider than the one before
by the same amount (eq. 3, additive), blocks are BN - conv - BN - ReLU - conv - BN - ReLU - conv - BN (fig. 6d, in the
bottleneck form), and the shortcut has no parameters: zeros fill up its channels, a mean over 2 x 2 its stride. The
paper rounds widths down; its authors' code, and with it the published count of parameters, rounds to the nearest.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError

FIRST_WIDTH = 16
EXPANSION = 4  # of a bottleneck: its output has this many times its width
STAGES = 3
LAYERS_PER_BLOCK = 3


class Bottleneck(nn.Module):
    """Maps (B, in, h, w) -> (B, 4 width, h / stride, w / stride)."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.stride, self.extra = stride, EXPANSION * width - in_width
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_width),
            nn.Conv2d(in_width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, EXPANSION * width, 1, bias=False),
            nn.BatchNorm2d(EXPANSION * width),
        )

    def forward(self, maps: Tensor) -> Tensor:
        shortcut = maps
        if self.stride > 1:
            # Rounded up as a convolution with padding 1 is, for sides that are odd.
            shortcut = F.avg_pool2d(maps, self.stride, ceil_mode=True)
        return self.residual(maps) + F.pad(shortcut, (0, 0, 0, 0, 0, self.extra))


class PyramidNet(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes), or the features (B, num_features) where classes is 0.

    depth: 9 n + 2, n blocks a stage; alpha: by how much the last block is wider than the first convolution. Raises
    UserError for another depth.
    """

    def __init__(self, depth: int, alpha: float, classes: int = 0):
        super().__init__()
        blocks_per_stage, rest = divmod(depth - 2, STAGES * LAYERS_PER_BLOCK)
        if rest or blocks_per_stage < 1:
            raise UserError(f"a PyramidNet cannot have depth {depth}: choose 9 n + 2, such as 11, 110 or 200")
        blocks = STAGES * blocks_per_stage
        self.stem = nn.Sequential(nn.Conv2d(3, FIRST_WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(FIRST_WIDTH))
        layers, in_width = [], FIRST_WIDTH
        for number in range(blocks):
            width = round(FIRST_WIDTH + alpha * (number + 1) / blocks)
            opens_later_stage = number > 0 and number % blocks_per_stage == 0
            layers.append(Bottleneck(in_width, width, stride=2 if opens_later_stage else 1))
            in_width = EXPANSION * width
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(in_width)
        self.num_features = in_width
        self.classifier = nn.Linear(in_width, classes) if classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, images: Tensor) -> Tensor:
        """Return f, (B, num_features) of images (B, 3, H, W), non-negative: the mean over the last maps."""
        return F.relu(self.norm(self.blocks(self.stem(images)))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.forward_features(images))


def pyramidnet(depth: int = 200, alpha: float = 240, classes: int = 0) -> PyramidNet:
    """Build a PyramidNet, untrained; the defaults have 1024 features and, for 10 classes, 26,752,702 parameters.

    classes: 0 for a body without a classifier, as ``classifier.ClassificationNetwork`` takes one.
    """
    return PyramidNet(depth, alpha, classes)
