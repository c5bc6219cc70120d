"""One job: a row and a seed, from its configuration to its run record."""

import contextlib
import fcntl
import importlib
import logging
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from shared.metrics.record import (
    RunRecord,
    energy_joules,
    environment,
    git_state,
    lock_sha256,
    peak_memory_bytes,
    read_record,
    write_record,
)
from shared.run.config import hash_of, repository_root
from shared.run.processes import run_in_processes

log = logging.getLogger(__name__)


def evidence_path(cfg: DictConfig) -> Path:
    """Return where the run record of a composed config belongs."""
    results = repository_root() / cfg.paths.results
    return results / cfg.scale.name / cfg.row / f"seed{cfg.seed}.json"


def run_folder(cfg: DictConfig) -> Path:
    """Return the folder of a run: checkpoint, curves, pictures.

    It carries the config hash, so that no checkpoint of another configuration is gone on from.
    """
    runs = repository_root() / cfg.paths.runs
    return runs / cfg.scale.name / cfg.row / f"seed{cfg.seed}-{hash_of(cfg)[0][:8]}"


def has_evidence(cfg: DictConfig) -> bool:
    """Return whether the record of this very configuration is there; one of another configuration is stale."""
    path = evidence_path(cfg)
    return path.exists() and read_record(path).config_sha256 == hash_of(cfg)[0]


@contextlib.contextmanager
def claimed(folder: Path):
    """Yield whether this process holds ``folder``; the hold ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(cfg: DictConfig, folder: Path) -> tuple[dict, int]:
    """Train and score one row and seed; returns the metrics and the largest resident memory in bytes."""
    if cfg.trainer.devices > 1:
        return run_in_processes(cfg, folder)
    metrics = importlib.import_module(f"{cfg.paper}.train").run(cfg, folder)
    return metrics, peak_memory_bytes()


def run_row(cfg: DictConfig) -> str:
    """Run one row and seed unless its evidence is there or another process is at it; returns what happened.

    Stale evidence is replaced only when the new run is whole.
    """
    digest, manifest = hash_of(cfg)
    folder = run_folder(cfg)
    with claimed(folder) as mine:
        if not mine:
            return "running elsewhere"
        if has_evidence(cfg):
            return "measured already"
        resumed = any(folder.rglob("last.ckpt"))
        started, begin, energy = datetime.now(UTC), time.perf_counter(), energy_joules()
        commit, dirty = git_state(repository_root())
        metrics, peak = run(cfg, folder)
        # A paper knows of checkpoints elsewhere. The seconds of a resumed run are of its last part alone.
        metrics["resumed"] = max(float(resumed), metrics.get("resumed", 0.0))
        record = RunRecord(
            paper=cfg.paper,
            row=cfg.row,
            scale=cfg.scale.name,
            seed=cfg.seed,
            selection=cfg.selection,
            variant=cfg.variant,
            n_test=int(metrics.pop("n_test")),
            metrics=metrics,
            # Paths are the machine's own: they change no number and are nobody's business.
            config={k: v for k, v in OmegaConf.to_container(cfg, resolve=True).items() if k != "paths"},
            config_sha256=digest,
            commit=commit,
            dirty=dirty,
            lock_sha256=lock_sha256(repository_root()),
            manifest_sha256=manifest,
            wall_seconds=time.perf_counter() - begin,
            peak_memory_bytes=peak,
            energy_joules=None if energy is None else energy_joules() - energy,
            started_at=started.isoformat(timespec="seconds"),
            **environment(),
        )
        write_record(evidence_path(cfg), record, overwrite=True)
        return "measured"


def task(cfg: DictConfig) -> str:
    """What Hydra's launchers call; a failure is recorded as ``failed.txt`` in the run's folder and raised."""
    record = run_folder(cfg) / "failed.txt"
    try:
        outcome = run_row(cfg)
    except Exception as error:
        log.error("%s seed %d: %s", cfg.row, cfg.seed, error)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        raise
    record.unlink(missing_ok=True)
    return outcome
