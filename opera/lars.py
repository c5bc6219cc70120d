"""LARS, layer-wise adaptive rates (You et al., arXiv 1708.03888), as MoCo-v3 trains ResNet-50 with it.

    d <- gradient + weight_decay * w                 for tensors of two dimensions or more
    d <- trust * ||w|| / ||d|| * d                   for the same ones, where both lengths are above 0
    v <- momentum * v + d,    w <- w - lr * v

Biases and the parameters of normalisations are neither decayed nor rescaled. timm's Lars takes ||gradient|| +
weight_decay ||w|| for ||d||.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from shared.errors import UserError


class LARS(torch.optim.Optimizer):
    """``trust``: the trust coefficient. Raises UserError for a negative rate, decay, momentum or trust."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ):
        values = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        for name, value in values.items():
            if not value >= 0:
                raise UserError(f"LARS: {name}={value} must not be negative")
        super().__init__(params, values)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict) -> None:
        change = parameter.grad
        if parameter.ndim > 1:
            change = change.add(parameter, alpha=group["weight_decay"])
            weight, length = parameter.norm(), change.norm()
            # On the device: asking the host would wait for it at every tensor.
            rate = torch.where((weight > 0) & (length > 0), group["trust"] * weight / length, 1.0)
            change = change * rate
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity = state["velocity"].mul_(group["momentum"]).add_(change)
        parameter.add_(velocity, alpha=-group["lr"])
