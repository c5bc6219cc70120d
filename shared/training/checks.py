"""What a run is computed on: devices, ranks, precision; one sentence where the machine does not have them."""

import os

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from shared.errors import UserError

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def device_of(cfg) -> torch.device:
    """Return where a network is scored: the accelerator of this machine unless the config says CPU."""
    if cfg.trainer.accelerator != "cpu" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def autocast_context(cfg, device: torch.device):
    """Return the context in which the network was trained: bfloat16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.optim.precision == "bf16-mixed")


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def ranks_of(trainer) -> int:
    """Return on how many devices a run is computed, those of all nodes."""
    return trainer.devices * trainer.num_nodes


def slurm_tasks() -> int:
    """Return how many tasks srun started, 1 outside of a batch job."""
    return int(os.environ.get("SLURM_NTASKS", 1)) if SLURMEnvironment.detect() else 1


def cluster_environment(trainer) -> ClusterEnvironment:
    """Return how the ranks of a run find each other: as torchrun or srun started them, else as Lightning does.

    A run on one device is on its own, whatever a job's shell has left in the environment. Lightning's requeueing under
    Slurm is off: it leaves a checkpoint where the next run finds it.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if ranks_of(trainer) > 1 and slurm_tasks() > 1:
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def is_rank() -> bool:
    """Return whether this process was started as one of several of a run: by torchrun, srun or Lightning."""
    started = TorchElasticEnvironment.detect() or slurm_tasks() > 1
    return started or LightningEnvironment().creates_processes_externally


def process_rank(trainer) -> int:
    """Return the rank of this process, which is known before torch.distributed is."""
    if ranks_of(trainer) == 1:
        return 0
    ranks = cluster_environment(trainer)
    if isinstance(ranks, LightningEnvironment):
        return ranks.node_rank() * trainer.devices + ranks.local_rank()
    return ranks.global_rank()


def join_torchrun(cfg) -> None:
    """Set ``trainer.devices`` and ``num_nodes`` to what torchrun started; UserError where they say otherwise."""
    if not TorchElasticEnvironment.detect():
        return
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // devices
    for key, started in (("devices", devices), ("num_nodes", nodes)):
        if cfg.trainer[key] not in (1, started):
            raise UserError(
                f"trainer.{key}={cfg.trainer[key]}, but torchrun started {started}: leave the key to torchrun"
            )
        cfg.trainer[key] = started


def require_devices(cfg) -> None:
    """Raise UserError where the config asks for an accelerator, or for more of them, than this node has."""
    kind, devices, ranks = cfg.trainer.accelerator, cfg.trainer.devices, ranks_of(cfg.trainer)
    tasks = 1 if TorchElasticEnvironment.detect() else slurm_tasks()
    if ranks > 1 and tasks not in (1, ranks):
        raise UserError(
            f"trainer.devices={devices} on trainer.num_nodes={cfg.trainer.num_nodes} are {ranks} ranks, but srun "
            f"started {tasks} tasks: set --ntasks-per-node={devices} and --nodes={cfg.trainer.num_nodes}"
        )
    if min(devices, cfg.trainer.num_nodes) < 1:
        raise UserError(
            f"trainer.devices={devices} and trainer.num_nodes={cfg.trainer.num_nodes}: set 1 or more of each"
        )
    if cfg.trainer.accumulate_grad_batches != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches={cfg.trainer.accumulate_grad_batches} is not implemented yet (batch "
            "statistics and negatives would be those of a part of the batch): set 1, and use more devices"
        )
    if kind in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={kind}, but PyTorch sees no GPU here: set trainer.accelerator=auto"
        )
    on_cpu = device_of(cfg).type == "cpu"
    if on_cpu and kind == "auto" and devices > 1:
        raise UserError(
            f"trainer.devices={devices}, but PyTorch sees no GPU here: set trainer.devices=1 trainer.strategy=auto, or "
            f"trainer.accelerator=cpu for {devices} processes on the CPU"
        )
    if not on_cpu and devices > torch.accelerator.device_count():
        present = torch.accelerator.device_count()
        raise UserError(
            f"trainer.devices={devices}, but there are {present} here: set trainer.devices={present}; the batch of "
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


def check_machine(cfg) -> None:
    """Join the ranks that torchrun started, and raise UserError for what this machine cannot compute."""
    join_torchrun(cfg)
    require_devices(cfg)
    require_precision(cfg)
