"""The network of retrieval: features of a backbone, and two linear heads, one for each half of an embedding.

The heads and the pooling are those of the release (net/resnet.py of github.com/wzzheng/IDML): maximum and mean over
places, added. The metric normalises and scales both halves (``introspective.py``); the network leaves them as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from shared.errors import UserError

POOLINGS = ("max+avg", "max", "avg")
INITIALISATIONS = ("linear", "fan_out")


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode whatever ``train`` sets."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def freeze_batchnorm(backbone: nn.Module) -> nn.Module:
    """Freeze statistics and affine parameters of every BatchNorm2d in place, and return the backbone.

    The release's recipe for ResNet-50 (``--bn-freeze 1``). Its training loop gives the affine parameters their gradient
    back at the end of the warm-up, together with everything else; here they keep what they have been given.
    """
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            # Another class for the same object: its tensors, their names and their device stay.
            norm.__class__ = FrozenBatchNorm2d
            norm.requires_grad_(False).eval()
    return backbone


def pooled(maps: Tensor, pooling: str) -> Tensor:
    """Return features (B, C) of maps (B, C, h, w): maximum over places, mean over places, or their sum."""
    if pooling == "avg":
        return maps.mean((2, 3))
    largest = maps.amax((2, 3))
    return largest if pooling == "max" else largest + maps.mean((2, 3))


class EmbeddingNetwork(nn.Module):
    """Images (B, 3, H, W) -> (B, semantic_dim + uncertainty_dim), [semantic | uncertainty], neither normalised.

    backbone: gives maps (B, C, h, w) and has ``num_features`` = C (``backbones.py``). uncertainty_dim: 0 for a
    baseline, which then has one head. pooling: "max+avg" as released, "max" or "avg". uncertainty_init: "linear" as
    released, which leaves this head at PyTorch's own uniform values, or "fan_out", drawn as the semantic head is. With
    "fan_out" the uncertainty of ResNet-50 begins 25 times larger, squared, and the metric's exponential at almost 0.
    Raises UserError for other names and for dimensions below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        semantic_dim: int,
        uncertainty_dim: int = 0,
        pooling: str = "max+avg",
        uncertainty_init: str = "linear",
    ):
        super().__init__()
        if pooling not in POOLINGS or uncertainty_init not in INITIALISATIONS:
            raise UserError(
                f"pooling={pooling}, uncertainty_init={uncertainty_init}: choose the pooling from "
                f"{', '.join(POOLINGS)}, the initialisation from {', '.join(INITIALISATIONS)}"
            )
        if semantic_dim < 1 or uncertainty_dim < 0:
            raise UserError(
                f"model.semantic_dim={semantic_dim}, model.uncertainty_dim={uncertainty_dim}: set the first to 1 or "
                "more, the second to 0 (no uncertainty) or more"
            )
        self.pooling, self.semantic_dim, self.uncertainty_dim = pooling, semantic_dim, uncertainty_dim
        self.backbone = backbone
        self.semantic = fan_out(nn.Linear(backbone.num_features, semantic_dim))
        self.uncertainty = None
        if uncertainty_dim:
            head = nn.Linear(backbone.num_features, uncertainty_dim)
            self.uncertainty = fan_out(head) if uncertainty_init == "fan_out" else head

    def forward(self, images: Tensor) -> Tensor:
        features = pooled(self.backbone(images), self.pooling)
        semantic = self.semantic(features)
        if self.uncertainty is None:
            return semantic
        return torch.cat([semantic, self.uncertainty(features)], 1)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that train from the first step: those of the heads."""
        yield from self.semantic.parameters()
        if self.uncertainty is not None:
            yield from self.uncertainty.parameters()

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that wait for the end of the warm-up; frozen ones never train and are left out."""
        yield from (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)


def fan_out(head: nn.Linear) -> nn.Linear:
    """Draw a head as the release does its semantic one: normal, variance 2 / outputs, zero bias."""
    nn.init.kaiming_normal_(head.weight, mode="fan_out")
    nn.init.zeros_(head.bias)
    return head
