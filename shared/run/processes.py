"""One run on several devices: a process for each, which torchrun's launcher starts, and the job in a file.

Lightning would start the whole command again on every device, and each of those processes would plan, time and
lock the work anew. Here they get the composed configuration and do nothing but train.
"""

import gc
import importlib
import json
import logging
import signal
import sys
import uuid
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from shared.errors import Stopped, UserError
from shared.metrics.record import peak_memory_bytes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that the launcher takes for itself
JOB, OUTCOME, REFUSED = "job.yaml", "outcome.json", "refused.txt"


def run_in_processes(cfg: DictConfig, folder: Path) -> tuple[dict, int]:
    """Return the metrics of a run on ``cfg.trainer.devices`` devices and rank 0's largest resident memory in bytes.

    Raises the UserError that a process raised, Stopped where a signal ended them, and RuntimeError where one failed
    otherwise; its traceback stands on standard error then.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    train = importlib.import_module(f"{cfg.paper}.train")
    getattr(train, "check", train.prepare)(cfg)  # bad input is said before anything is started
    gc.collect()
    torch.cuda.empty_cache()  # what this process took on the first device, to time its steps, is needed there
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it repeats what is said here
    for name in (OUTCOME, REFUSED):
        (folder / name).unlink(missing_ok=True)
    OmegaConf.save(cfg, folder / JOB, resolve=True)
    devices = cfg.trainer.devices
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        elastic_launch(config, sys.executable)("-m", "shared.run.processes", str(folder))
    except SignalException as error:  # the processes have been stopped by then
        raise Stopped(128 + error.sigval) from error
    except ChildFailedError as error:
        stopped = {128 + number for number in SIGNALS}
        codes = stopped & {failure.exitcode for failure in error.failures.values()}
        if codes:
            raise Stopped(min(codes)) from error
        if (folder / REFUSED).exists():
            raise UserError((folder / REFUSED).read_text(encoding="utf-8")) from None
        raise RuntimeError(
            f"one of the {devices} processes of {cfg.row} failed; its error stands above"
        ) from error
    finally:
        # The launcher leaves its own behind, which raise what stops nobody else.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    return outcome["metrics"], outcome["peak_memory_bytes"]


def main(folder: Path) -> int:
    """What every process does: train, and on rank 0 write what came out; exit code 2 for bad input."""
    cfg = OmegaConf.load(folder / JOB)
    try:
        metrics = importlib.import_module(f"{cfg.paper}.train").run(cfg, folder)
    except UserError as error:
        (folder / REFUSED).write_text(str(error), encoding="utf-8")
        return 2
    except Stopped as stop:
        return stop.code
    if metrics is not None:
        outcome = {"metrics": metrics, "peak_memory_bytes": peak_memory_bytes()}
        (folder / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


if __name__ == "__main__":
    from shared.run.__main__ import quieten

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quieten()
    sys.exit(main(Path(sys.argv[1])))
