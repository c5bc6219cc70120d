"""The effective receptive field: how strongly each pixel of the input moves what the network decides from.

W. Luo et al., "Understanding the effective receptive field in deep convolutional neural networks", NeurIPS 2016,
arXiv 1701.04128: the gradient of a central feature to the input, here its absolute value summed over channels and
averaged over images. The central feature is the middle of the last grid of tokens where ``forward_features`` gives a
grid; where it gives a sequence, the class token, or the mean over the tokens where there is none.
"""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

FLOOR = 1e-3  # of the largest value: what is darker is drawn black


def central_feature(network: nn.Module, images: Tensor) -> Tensor:
    """Return the feature (B, C) that the receptive field is asked of; ``network.position``: of the class token."""
    features = network.forward_features(images)
    if features.dim() == 4:
        return features[:, :, features.shape[2] // 2, features.shape[3] // 2]
    position = getattr(network, "position", features.shape[1] - 1)
    return features.mean(1) if position is None else features[:, position]


def receptive_field(network: nn.Module, images: Tensor) -> Tensor:
    """Return the field (H, W), float32 on the CPU, its largest value 1; images (B, C, H, W), one at a time."""
    network = network.eval()
    field = torch.zeros(images.shape[2:], device=images.device)
    for image in images.split(1):
        image = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(central_feature(network, image).sum(), image)
        field += gradient.abs().sum((0, 1)).float()
    return (field / field.max().clamp_min(torch.finfo(field.dtype).tiny)).cpu()


def draw_receptive_field(path: Path, network: nn.Module, images: Tensor) -> None:
    """Write the field of ``network`` over ``images`` (B, C, H, W) as a PNG, on a logarithmic scale."""
    field = receptive_field(network, images).clamp_min(FLOOR).log10()
    figure = Figure(figsize=(4.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = axes.imshow(field.numpy(), cmap="magma", interpolation="nearest")
    axes.set(title=f"gradient to the input, mean of {len(images)} images", xticks=[], yticks=[])
    figure.colorbar(drawn, label="log10, largest = 0")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
