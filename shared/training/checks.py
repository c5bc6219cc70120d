"""What a run is computed on: devices, ranks, precision; one sentence where the machine does not have them."""

import os

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment as Slurm
from lightning.fabric.plugins.environments import TorchElasticEnvironment as Torchrun

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
    return int(os.environ.get("SLURM_NTASKS", 1)) if Slurm.detect() else 1


def cluster_environment(trainer) -> ClusterEnvironment:
    """Return how the ranks of a run find each other: as torchrun or srun started them, else as Lightning does.

    A run on one device is on its own, whatever a job's shell has left in the environment. Lightning's requeueing under
    Slurm is off: it leaves a checkpoint where the next run finds it.
    """
    if Torchrun.detect():
        return Torchrun()
    if ranks_of(trainer) > 1 and slurm_tasks() > 1:
        return Slurm(auto_requeue=False)
    return LightningEnvironment()


def is_rank() -> bool:
    """Return whether this process was started as one of several of a run: by torchrun, srun or Lightning."""
    started = Torchrun.detect() or slurm_tasks() > 1
    return started or LightningEnvironment().creates_processes_externally


def process_rank(trainer) -> int:
    """Return the rank of this process, which is known before torch.distributed is."""
    if ranks_of(trainer) == 1:
        return 0
    ranks = cluster_environment(trainer)
    if isinstance(ranks, LightningEnvironment):
        return ranks.node_rank() * trainer.devices + ranks.local_rank()
    return ranks.global_rank()


def join_torchrun(trainer) -> None:
    """Set ``devices`` and ``num_nodes`` to what torchrun started; UserError where they say otherwise."""
    if not Torchrun.detect():
        return
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    for key, started in (("devices", devices), ("num_nodes", int(os.environ["WORLD_SIZE"]) // devices)):
        if trainer[key] not in (1, started):
            raise UserError(f"trainer.{key}={trainer[key]}, but torchrun started {started}: leave the key to torchrun")
        trainer[key] = started


def refusals(cfg):
    """Yield what this machine cannot compute: whether it is so, and the sentence about it."""
    trainer, precision, on_cpu = cfg.trainer, cfg.optim.precision, device_of(cfg).type == "cpu"
    kind, devices, nodes = trainer.accelerator, trainer.devices, trainer.num_nodes
    ranks, tasks = devices * nodes, 1 if Torchrun.detect() else slurm_tasks()
    present = 0 if on_cpu else torch.accelerator.device_count()
    yield (
        # Lightning takes no tasks that were asked for in all, not for a node.
        ranks > 1 and tasks > 1 and (tasks != ranks or "SLURM_NTASKS_PER_NODE" not in os.environ),
        f"trainer.devices={devices} on trainer.num_nodes={nodes} need {ranks} ranks, but srun started {tasks}: set "
        f"--ntasks-per-node={devices} and --nodes={nodes}",
    )
    yield (min(devices, nodes) < 1, f"trainer.devices={devices} and trainer.num_nodes={nodes}: set 1 or more of each")
    yield (
        trainer.accumulate_grad_batches != 1,
        f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is not implemented yet (batch statistics "
        "and negatives would be those of a part of the batch): set 1, and use more devices",
    )
    yield (
        kind in ("gpu", "cuda") and not torch.cuda.is_available(),
        f"trainer.accelerator={kind}, but PyTorch sees no GPU here: set trainer.accelerator=auto",
    )
    yield (
        on_cpu and kind == "auto" and devices > 1,
        f"trainer.devices={devices}, but PyTorch sees no GPU here: set trainer.devices=1 trainer.strategy=auto, or "
        f"trainer.accelerator=cpu for {devices} processes on the CPU",
    )
    yield (
        not on_cpu and devices > present,
        f"trainer.devices={devices}, but there are {present} here: set trainer.devices={present}; the batch of "
        "optim.batch_size is shared by them",
    )
    yield (
        precision not in PRECISIONS,
        f"optim.precision={precision} is not supported: choose one of {', '.join(PRECISIONS)} (float16 needs a "
        "gradient scaler, which cannot be combined with skipping steps that are not finite)",
    )
    yield (
        precision == "bf16-mixed" and on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "this CPU has no bfloat16 arithmetic: set optim.precision=32-true, or train on a GPU",
    )


def check_machine(cfg) -> None:
    """Join the ranks that torchrun started, and raise UserError for what this machine cannot compute."""
    join_torchrun(cfg.trainer)
    for is_so, sentence in refusals(cfg):
        if is_so:
            raise UserError(sentence)
