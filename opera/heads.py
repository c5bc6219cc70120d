"""The small networks between the spaces: projector, predictor, and the head of the classes.

Those of MoCo-v3 (https://github.com/facebookresearch/moco-v3) and of OPERA's release
(https://github.com/wangck20/OPERA): linear maps without biases, batch norm and ReLU between them.
"""

from torch import nn

from shared.errors import UserError


def mlp(layers: int, inputs: int, hidden: int, outputs: int, last_norm: bool) -> nn.Sequential:
    """Return ``layers`` linear maps (B, inputs) -> (B, outputs) with batch norm and ReLU after all but the last.

    ``last_norm``: a batch norm without scale and shift after the last. Raises UserError for less than one layer.
    """
    if layers < 1:
        raise UserError(f"a head of {layers} layers is none: give 1 or more")
    widths = [inputs, *[hidden] * (layers - 1), outputs]
    parts: list[nn.Module] = []
    for number, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
        parts.append(nn.Linear(before, after, bias=False))
        if number < layers:
            parts += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    if last_norm:
        parts.append(nn.BatchNorm1d(outputs, affine=False))
    return nn.Sequential(*parts)
