"""What a run is computed on: device and arithmetic, and one sentence where the config asks for what is not here."""

import torch

from shared.errors import UserError

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def device_of(cfg) -> torch.device:
    """Return where a network is scored: the accelerator of this machine unless the config says CPU."""
    if cfg.trainer.accelerator != "cpu" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def arithmetic(cfg, device: torch.device):
    """Return the context in which the network was trained: bfloat16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.optim.precision == "bf16-mixed")


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def require_device(cfg) -> None:
    """Raise UserError where the config asks for an accelerator, or for more of them, than are here."""
    kind, devices = cfg.trainer.accelerator, cfg.trainer.devices
    if kind in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={kind}, but PyTorch sees no GPU here: set trainer.accelerator=auto"
        )
    here = torch.accelerator.device_count() if device_of(cfg).type != "cpu" else None
    if here is None and kind == "auto" and devices > 1:
        raise UserError(
            f"trainer.devices={devices}, but PyTorch sees no GPU here: set trainer.devices=1 trainer.strategy=auto, or "
            f"trainer.accelerator=cpu for {devices} processes on the CPU"
        )
    if here is not None and devices > here:
        raise UserError(
            f"trainer.devices={devices}, but there are {here} here: set trainer.devices={here}; the batch of "
            "optim.batch_size is shared by them"
        )


def require_precision(cfg) -> None:
    """Raise UserError for a precision that this device has no arithmetic for."""
    precision = cfg.optim.precision
    if precision not in PRECISIONS:
        raise UserError(
            f"optim.precision={precision} is not known here: choose one of {', '.join(PRECISIONS)} "
            "(float16 needs a gradient scaler, which does not go with skipping steps that are not finite)"
        )
    if precision == "bf16-mixed" and device_of(cfg).type == "cpu":
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise UserError(
                "this CPU has no bfloat16 arithmetic: set optim.precision=32-true, or train on a GPU"
            )
