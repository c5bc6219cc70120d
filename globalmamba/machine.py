"""Whether a run's scan can be computed here; device and arithmetic are those of ``shared.run.machine``."""

import torch

from globalmamba.kernels.selective_scan.op import BACKENDS, selective_scan
from shared.errors import UserError
from shared.run.machine import device_of


def require_backend(cfg) -> None:
    """Raise UserError where ``trainer.backend`` is unknown or cannot run on this device."""
    backend, one = cfg.trainer.backend, torch.zeros(1, 1, 1, device=device_of(cfg))
    if backend not in BACKENDS:
        raise UserError(f"trainer.backend={backend} is not known here: choose one of {', '.join(BACKENDS)}")
    try:
        selective_scan(one, one, one[0], one, one, backend=backend)
    except RuntimeError as error:
        raise UserError(f"{' '.join(str(error).split())}: set trainer.backend=auto") from error
