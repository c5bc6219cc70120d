"""LARS, layer-wise adaptive rates (You et al., arXiv 1708.03888), as MoCo-v3 trains ResNet-50 with it.

    d <- gradient + weight_decay * w                 for tensors of two dimensions or more
    d <- trust * ||w|| / ||d|| * d                   for the same tensors, where both lengths are above 0
    v <- momentum * v + d,    w <- w - lr * v

Biases and the parameters of normalisations are neither decayed nor rescaled. timm's Lars uses ||gradient|| +
weight_decay ||w|| as ||d||.
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
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        # All tensors at once: one by one a ResNet-50 has a thousand launches.
        scaled = [parameter for parameter in parameters if parameter.ndim > 1]
        changes = {parameter: parameter.grad for parameter in parameters}
        if scaled:
            changes |= zip(scaled, _changes(scaled, group["weight_decay"], group["trust"]), strict=True)
        for parameter in parameters:
            if "velocity" not in self.state[parameter]:
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)
        velocities = [self.state[parameter]["velocity"] for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, list(changes.values()))
        torch._foreach_add_(parameters, velocities, alpha=-group["lr"])


def _changes(weights: list[Tensor], weight_decay: float, trust: float) -> list[Tensor]:
    """Return the decayed and rescaled gradients."""
    changes = torch._foreach_add([weight.grad for weight in weights], weights, alpha=weight_decay)
    lengths, sizes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (changes, weights))
    # On the device: asking the host would wait for it.
    rates = torch.where((sizes > 0) & (lengths > 0), trust * sizes / lengths, 1.0)
    torch._foreach_mul_(changes, list(rates.unbind()))
    return changes
