"""Running a function on gloo ranks of this machine, for tests."""

import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(rank: int, ranks: int, port: int, function: Callable, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, *arguments), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_ranks(ranks: int, function: Callable, folder, *arguments) -> list:
    """Return what ``function(rank, *arguments)`` returns on each rank; it must be importable by name."""
    start = (ranks, free_port(), function, str(folder), arguments)
    mp.start_processes(_rank, start, nprocs=ranks, start_method="forkserver")
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(ranks)]
