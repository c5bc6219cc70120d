"""What the papers' ``model.py`` share: what cannot be built is one sentence, and how parameters and FLOPs are counted.

Counting rule (the same for a row and its baseline): one multiply-add of a linear map or a convolution is 1, a scan is
9 B L D N for each of its directions.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hydra.errors import InstantiationException
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.errors import UserError

from .schema import ClassificationConfig

PAPER = __name__.partition(".")[0]
CHANNELS = 3  # images are RGB, grey ones repeated


@contextmanager
def explained(name: str):
    """Raise what goes wrong while the model ``name`` is instantiated as a UserError."""
    try:
        yield
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"model {name} is configured wrongly ({reason}): fix the key in {PAPER}/configs") from error


def require_task(cfg: ClassificationConfig) -> None:
    """Raise UserError for a task that no network here is trained on; ``dense`` is what stands behind one."""
    if cfg.data.task != "classification":
        raise UserError(f"data.task={cfg.data.task} is unknown: set classification, or choose a row with dense")


def parameters_of(network: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@dataclass
class ScanFlops:
    """FLOPs of the scans of a network: all of them, and each call counted for one of its directions."""

    all: int = 0
    once: int = 0

    def add(self, once: int, directions: int = 1) -> int:
        """Add a call of so many directions; return its FLOPs."""
        self.all += directions * once
        self.once += once
        return directions * once


def count_with(
    network: nn.Module, image_size: int, channels: int, formulas: Callable[[ScanFlops], dict]
) -> dict[str, int]:
    """Return parameters and FLOPs of one image, by the counting rule above; nothing is computed.

    ``formulas``: the scans' operators -> what a call counts, adding it to the ``ScanFlops``. Keys: parameters, flops,
    flops_without_scan, flops_scan_once.
    """
    network = network.to("meta").eval()
    image = torch.empty(1, channels, image_size, image_size, device="meta")
    return {"parameters": parameters_of(network)} | count_call(lambda: network(image), formulas)


def count_call(call: Callable[[], object], formulas: Callable[[ScanFlops], dict]) -> dict[str, int]:
    """Return the FLOPs of a call on tensors of the meta device; keys as ``count_with``, without the parameters."""
    scans = ScanFlops()
    counter = FlopCounterMode(display=False, custom_mapping=formulas(scans))
    with counter, torch.no_grad():
        call()
    # The counter gives 2 for a multiply-add.
    without = (counter.get_total_flops() - scans.all) // 2
    return {"flops": without + scans.all, "flops_without_scan": without, "flops_scan_once": without + scans.once}
