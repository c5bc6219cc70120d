"""Whether a run's scan can be computed here; device and arithmetic are those of ``shared.run.machine``."""

import torch

from shared.errors import UserError
from shared.run.machine import device_of
from v2m.kernels.scan2d import scan2d
from v2m.kernels.scan2d.op import BACKENDS


def require_backend(cfg) -> None:
    """Raise UserError where ``trainer.backend`` is unknown or cannot run on this device."""
    backend, one = cfg.trainer.backend, torch.zeros(1, 1, 1, 1, 1, device=device_of(cfg))
    if backend not in BACKENDS:
        raise UserError(f"trainer.backend={backend} is not known here: choose one of {', '.join(BACKENDS)}")
    try:
        scan2d(one, one, one[0, :, :, :, 0], directions=("right",), backend=backend)
    except RuntimeError as error:
        raise UserError(f"{' '.join(str(error).split())}: set trainer.backend=auto") from error
