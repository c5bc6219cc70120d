"""The introspective metric on logits, for image classification with ResNet-50 and PyramidNet-200.

From the released code (image_classification/, in the history of github.com/wzzheng/IDML before 66812ee): of a feature f

    u   = ReLU(V f + v)                          its uncertainty, not normalised
    p_c = W_c + b_c                              the vector of class c: identity passed through the classifier, so that
                                                 the bias, one number, is added to every coordinate
    o_c = W_c . f + b_c                          the logit, which evaluation uses
    o'_c = 1 - (1 - o_c) exp(-(||u||^2 + offset) / (tau ||f - p_c||^2))        the logit that is trained on

with tau = 5 and offset 0.

What can starve the uncertainty head of gradient, looked at with untrained networks on crops of photographs:
- The exponential underflows, in float32 where ||u||^2 exceeds about 104 tau ||f - p_c||^2. With PyTorch's own linear
  layers ||u||^2 / (tau ||f||^2) begins near U / (6 tau F), whatever the scale of f: measured 0.008 for ResNet-50
  (F = 2048, U = 512), 0.004 for PyramidNet-200 (F = 1024, U = 128), so that the exponential begins at 0.98 or above.
- ReLU: features are non-negative and resemble each other (mean cosine 0.76 to 0.91 and 0.83), so that a coordinate of u
  tends to be on or off for all images at once: 11 to 30 % and 18 % were 0 on a whole batch of 48 or 24 and 16; their
  rows of V get no gradient from it, the others do. The whole head was never dead.
- o_c = 1, where the exponential's factor is 0, and f = p_c, where the distance is bounded from below.
The gradient is small beside the classifier's: its norm is 1/200 to 1/600 for ResNet-50, 1/500 or less for PyramidNet.
"""

import torch
from torch import Tensor, nn

from shared.errors import UserError

SMALLEST = 1e-12  # of a squared distance that is divided by


def introspective_logits(
    features: Tensor, weight: Tensor, bias: Tensor, uncertainty: Tensor, tau: float, offset: float
) -> Tensor:
    """Return o', (B, classes), of f (B, F), W (classes, F), b (classes,) and u (B, U), in float32 or wider.

    The distances come from norms and the one product that the logits need anyway; no (B, classes, F) is made.
    """
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        f, W, b, u = (part.to(dtype) for part in (features, weight, bias, uncertainty))
        products = f @ W.T  # (B, classes)
        logits = products + b
        # f . p_c = f . W_c + b_c sum(f), and so for ||p_c||^2
        f_dot_p = products + torch.outer(f.sum(1), b)
        p_squared = W.square().sum(1) + 2 * b * W.sum(1) + W.shape[1] * b.square()
        distances = f.square().sum(1)[:, None] + p_squared - 2 * f_dot_p
        exponents = (u.square().sum(1)[:, None] + offset) / (tau * distances.clamp_min(SMALLEST))
        return 1 - (1 - logits) * torch.exp(-exponents)


class IntrospectiveClassifier(nn.Module):
    """Features f (B, features) -> logits (B, classes): o' in training mode, o in evaluation mode.

    In evaluation ``uncertainty`` is not used, so its weight and bias get no gradient there. Raises UserError for
    uncertainty_dim < 1, tau <= 0 and a negative offset.
    """

    def __init__(self, features: int, classes: int, uncertainty_dim: int, tau: float = 5.0, offset: float = 0.0):
        super().__init__()
        if uncertainty_dim < 1 or not tau > 0 or not offset >= 0:
            raise UserError(
                f"model.uncertainty_dim={uncertainty_dim}, metric.tau={tau}, metric.offset={offset}: set the first to "
                "1 or more, tau above 0 and offset to 0 or more"
            )
        self.tau, self.offset = tau, offset
        self.classifier = nn.Linear(features, classes)
        self.uncertainty = nn.Linear(features, uncertainty_dim)

    def uncertainty_of(self, features: Tensor) -> Tensor:
        """Return u, (B, uncertainty_dim), non-negative."""
        return self.uncertainty(features).relu()

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return self.classifier(features)
        weight, bias = self.classifier.weight, self.classifier.bias
        return introspective_logits(features, weight, bias, self.uncertainty_of(features), self.tau, self.offset)


class ClassificationNetwork(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes).

    body: gives features (B, F), or maps (B, F, h, w) that are averaged over places (``pyramidnet.py``,
    ``backbones.py``). head: ``IntrospectiveClassifier``, or ``nn.Linear`` for the baseline.
    """

    def __init__(self, body: nn.Module, head: nn.Module):
        super().__init__()
        self.body, self.head = body, head

    def features(self, images: Tensor) -> Tensor:
        """Return f, (B, F)."""
        maps = self.body(images)
        return maps.mean((2, 3)) if maps.ndim == 4 else maps

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
