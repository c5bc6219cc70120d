"""What a run is refused for, beside its device and precision (``shared.training.checks``): task, variant, scan."""

import torch

from shared.dense.config import check_dense
from shared.errors import UserError
from shared.training.checks import device_of
from v2m.kernels.scan2d import scan2d
from v2m.kernels.scan2d.op import BACKENDS
from v2m.model_base import require_task
from v2m.released import require_release
from v2m.schema import ClassificationConfig


def require_backend(cfg: ClassificationConfig) -> None:
    """Raise UserError where ``trainer.backend`` is unknown or cannot run on this device."""
    backend, number = cfg.trainer.backend, torch.zeros(1, 1, 1, 1, 1, device=device_of(cfg))
    if backend not in BACKENDS:
        raise UserError(f"trainer.backend={backend} is not supported: choose one of {', '.join(BACKENDS)}")
    try:
        scan2d(number, number, number[0, :, :, :, 0], directions=("right",), backend=backend)
    except RuntimeError as error:
        raise UserError(f"{' '.join(str(error).split())}: set trainer.backend=auto") from error


def check(cfg: ClassificationConfig) -> None:
    """Raise UserError for a task that is not implemented, a release that is none, a scan that cannot run here."""
    require_task(cfg)
    if cfg.dense is not None:
        check_dense(cfg.dense)
    require_release(cfg)
    require_backend(cfg)
