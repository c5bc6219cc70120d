"""One run: a row and a seed, from its composed configuration to its run record.

A paper's ``train.py`` and ``evaluate.py`` are Hydra applications. Around their ``main`` stands ``command``, which turns
a user's error into one sentence and exit code 2; inside it ``run_job`` does what is the same for every paper.
"""

import contextlib
import fcntl
import functools
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from shared.commands import format_duration, print_error, run_command, silence_library_logs
from shared.environment import energy_joules, environment, git_state, lock_sha256, peak_memory_bytes
from shared.errors import RunInterrupted, UserError
from shared.metrics.names import load_names
from shared.training.checks import check_machine, is_rank, process_rank, ranks_of
from shared.training.config import (
    CONFIG_ERRORS,
    config_reason,
    evidence_path,
    failure_path,
    has_evidence,
    hash_of,
    root_of,
    run_folder,
)
from shared.training.record import RunRecord, read_record, write_record

log = logging.getLogger(__name__)
Train = Callable[[DictConfig, Path], dict | None]  # (cfg, run folder) -> metrics, None on ranks other than 0
Check = Callable[[DictConfig], None]


def command(main: Callable) -> Callable:
    """Decorate an application: exit code 2 and one sentence for a user's error, 1 for a failure, 130 or 143 for a stop.

    Stands above ``hydra.main``, which passes every error on where HYDRA_FULL_ERROR is set.
    """

    @functools.wraps(main)
    def run(*arguments, **options):
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            return main(*arguments, **options)
        except (
            RunInterrupted,
            KeyboardInterrupt,
        ) as stop:  # the latter outside a training, where Lightning is not
            stop = stop if isinstance(stop, RunInterrupted) else RunInterrupted(128 + signal.SIGINT)
            print_error(stop)
            sys.exit(stop.code)
        except CONFIG_ERRORS as error:
            sys.exit(report(UserError(f"{config_reason(error)}; fix the key or the value")))
        except Exception as error:
            sys.exit(report(error))

    return run


def report(error: Exception) -> int:
    """Print an error, unless a job has said it already, and return the exit code that it means.

    An application ends with it inside ``hydra.main``, which prints its overrides before an error that it is raised.
    """
    if isinstance(error, UserError):
        if not hasattr(error, "was_logged"):
            print_error(error)
        return 2
    if not hasattr(error, "was_logged"):
        traceback.print_exception(error)
    return 1


@contextlib.contextmanager
def folder_lock(folder: Path):
    """Yield whether this process holds ``folder``; the hold ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run_job(cfg: DictConfig, train: Train, check: Check | None = None) -> float | None:
    """Run a row and seed unless its evidence is there; returns its first metric, None where nothing was measured.

    ``check``: raises UserError for what the paper's own code refuses. A failure is kept as ``failed.txt`` in the run's
    folder. Of a multirun it is raised, and the other jobs go on; otherwise it ends the process with ``command``'s code.
    """
    silence_library_logs()
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if in_sweep and ranks_of(cfg.trainer) > 1 and not is_rank():
            outcome = _run_in_own_process(cfg)
        else:
            outcome = measure(cfg, train, check)
    except Exception as error:
        sentence = _keep_failure(cfg, error)
        if in_sweep:
            log.error(
                "%s seed %d failed: %s",
                cfg.row,
                cfg.seed,
                sentence,
                exc_info=not isinstance(error, UserError),
            )
            error.was_logged = True
            raise
        sys.exit(report(error))
    failure_path(cfg).unlink(missing_ok=True)
    log.info("%s seed %d: %s", cfg.row, cfg.seed, outcome)
    metrics = read_record(evidence_path(cfg)).metrics if has_evidence(cfg) else {}
    return metrics.get(load_names().headline(metrics))


def _keep_failure(cfg: DictConfig, error: Exception) -> str:
    """Write ``failed.txt``, a sentence and, where it is no user's error, the traceback; returns the sentence."""
    is_users = isinstance(error, UserError)
    sentence = str(error) if is_users else f"{type(error).__name__}: {error}"
    frames = [] if is_users else traceback.format_exception(error)
    with contextlib.suppress(OSError):  # the disk may be what failed
        failure_path(cfg).parent.mkdir(parents=True, exist_ok=True)
        failure_path(cfg).write_text("".join([" ".join(sentence.split()), "\n", *frames]), encoding="utf-8")
    return sentence


def _run_in_own_process(cfg: DictConfig) -> str:
    """Run a multirun's job on several devices as a command of its own, since Lightning starts that once per device."""
    code = run_command([sys.executable, "-m", f"{cfg.paper}.train", *HydraConfig.get().overrides.task])
    if code > 128:
        raise RunInterrupted(code)
    if code:
        failed = failure_path(cfg)
        sentence = (
            failed.read_text(encoding="utf-8").partition("\n")[0] if failed.exists() else f"code {code}"
        )
        raise UserError(sentence) if code == 2 else RuntimeError(sentence)
    return "done"


def measure(cfg: DictConfig, train: Train, check: Check | None = None) -> str:
    """Check, train, score and record one row and seed; returns what happened in words.

    Nothing is trained where the evidence is there or another process is at it. Stale evidence is replaced only when
    the new run is whole. Of several ranks the first one holds the folder and writes the record.
    """
    if has_evidence(cfg):
        return "measured already"
    check_machine(cfg)
    if check is not None:
        check(cfg)
    folder = run_folder(cfg)
    if process_rank(cfg.trainer) > 0:
        train(cfg, folder)
        return "measured by rank 0"
    with folder_lock(folder) as is_held:
        if is_held:
            return "measured already" if has_evidence(cfg) else _record(cfg, train, folder)
    if ranks_of(cfg.trainer) > 1:  # the other ranks would wait for this one
        raise UserError(
            f"{folder} is in use by another run: wait for it, or give another folder as paths.runs"
        )
    return "running elsewhere"


def _record(cfg: DictConfig, train: Train, folder: Path) -> str:
    (digest, manifest), root = hash_of(cfg), root_of(cfg)
    was_started = any(folder.rglob("last.ckpt"))
    started, begin, energy = datetime.now(UTC), time.perf_counter(), energy_joules()
    commit, dirty = git_state(root)
    metrics = train(cfg, folder)
    # A paper knows of checkpoints elsewhere. The seconds of a resumed run are of its last part alone.
    metrics["resumed"] = max(float(was_started), metrics.get("resumed", 0.0))
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
        lock_sha256=lock_sha256(root),
        manifest_sha256=manifest,
        wall_seconds=time.perf_counter() - begin,
        peak_memory_bytes=peak_memory_bytes(),
        energy_joules=None if energy is None else energy_joules() - energy,
        started_at=started.isoformat(timespec="seconds"),
        **environment(),
    )
    write_record(evidence_path(cfg), record, overwrite=True)
    seconds, names = format_duration(record.wall_seconds), load_names()
    headline = names.headline(record.metrics)
    if headline is None:
        return f"measured ({seconds})"
    return f"{names.metrics[headline].label} {names.metrics[headline].text(record.metrics[headline])} ({seconds})"
