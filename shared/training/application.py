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
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.environment import energy_joules, environment, git_state, lock_sha256, peak_memory_bytes
from shared.errors import RunInterrupted, UserError
from shared.metrics.names import load_names
from shared.training.checks import check_machine, cluster_environment, process_rank, ranks_of
from shared.training.config import evidence_path, has_evidence, hash_of, root_of, run_folder
from shared.training.record import RunRecord, read_record, write_record

log = logging.getLogger(__name__)
# What Lightning warns of and is meant so: short epochs, one worker, its own use of a deprecated function, and a resumed
# run that begins inside an epoch, which the sampler knows and Lightning does not.
EXPECTED_WARNINGS = (
    r"lightning\.pytorch\."
    r"(utilities\._pytree|loops\.(fit_loop|training_epoch_loop)|trainer\.connectors\.data_connector)"
)

Train = Callable[[DictConfig, Path], dict | None]  # (cfg, run folder) -> metrics, None on ranks other than 0
Check = Callable[[DictConfig], None]


def print_error(text: str) -> None:
    """Print one line on standard error."""
    sys.stderr.write(" ".join(text.split()) + "\n")


def hydra_sentence(error: HydraException | OmegaConfBaseException) -> str:
    """Return what is wrong with a configuration or an override, without Hydra's and OmegaConf's frames around it."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return " ".join(str(cause).split("\n    full_key")[0].split()) + "; fix the key or the value"


def silence_library_logs() -> None:
    """Silence what Lightning says of no consequence for a run."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=EXPECTED_WARNINGS)


def command(main: Callable) -> Callable:
    """Decorate an application: exit code 2 and one sentence for a user's error, 1 for a failure, 130 or 143 for a stop.

    Stands above ``hydra.main``, which passes every error on while HYDRA_FULL_ERROR is set.
    """

    @functools.wraps(main)
    def run(*arguments, **options):
        before = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            return main(*arguments, **options)
        except UserError as error:
            if not hasattr(error, "was_logged"):
                print_error(str(error))
            sys.exit(2)
        except (HydraException, OmegaConfBaseException) as error:
            print_error(hydra_sentence(error))
            sys.exit(2)
        except RunInterrupted as stop:
            print_error(str(stop))
            sys.exit(stop.code)
        except KeyboardInterrupt:  # outside a training, where Lightning does not see it
            stop = RunInterrupted(128 + signal.SIGINT)
            print_error(str(stop))
            sys.exit(stop.code)
        except Exception as error:
            if not hasattr(error, "was_logged"):
                traceback.print_exc()
            sys.exit(1)
        finally:
            os.environ.pop("HYDRA_FULL_ERROR")
            if before is not None:
                os.environ["HYDRA_FULL_ERROR"] = before

    return run


@contextlib.contextmanager
def user_error_is_final():
    """End the process at a user's error: Hydra would say a line of its own about the job before ``command`` does."""
    try:
        yield
    except UserError as error:
        print_error(str(error))
        sys.exit(2)


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
    failed = run_folder(cfg) / "failed.txt"
    try:
        if _is_sweep() and ranks_of(cfg.trainer) > 1 and not _is_rank():
            _run_in_own_process(cfg)
            outcome = "done"
        else:
            outcome = measure(cfg, train, check)
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        frames = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # the disk may be what failed
            failed.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(f"{sentence}\n{frames}", encoding="utf-8")
        if _is_sweep():
            log.error("%s seed %d failed: %s", cfg.row, cfg.seed, sentence, exc_info=bool(frames))
            error.was_logged = True
            raise
        if not isinstance(error, UserError):
            traceback.print_exception(error)
            sys.exit(1)
        print_error(sentence)
        sys.exit(2)
    failed.unlink(missing_ok=True)
    log.info("%s seed %d: %s", cfg.row, cfg.seed, outcome)
    metrics = read_record(evidence_path(cfg)).metrics if has_evidence(cfg) else {}
    return metrics.get(load_names().headline(metrics))


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _is_rank() -> bool:
    """Return whether this process was started as one of several of a run: by torchrun, srun or Lightning."""
    return cluster_environment(DictConfig({"devices": 2, "num_nodes": 1})).creates_processes_externally


def _run_in_own_process(cfg: DictConfig) -> None:
    """Run a multirun's job on several devices as a command of its own, since Lightning starts that once per device."""
    arguments = ["-m", f"{cfg.paper}.train", *HydraConfig.get().overrides.task]
    job = subprocess.Popen([sys.executable, *arguments])
    handler = signal.signal(signal.SIGTERM, lambda number, _: job.send_signal(number))
    try:
        code = job.wait()
    finally:
        signal.signal(signal.SIGTERM, handler)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise RunInterrupted(code)
    if code:
        failed = run_folder(cfg) / "failed.txt"
        sentence = (
            failed.read_text(encoding="utf-8").partition("\n")[0] if failed.exists() else f"exit code {code}"
        )
        raise UserError(sentence) if code == 2 else RuntimeError(sentence)


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
    path = evidence_path(cfg)
    is_replaced = path.exists()
    write_record(path, record, overwrite=True)
    if is_replaced:
        log.warning("%s held evidence of another configuration, now replaced; paths.results keeps both", path)
    seconds, names = format_duration(record.wall_seconds), load_names()
    headline = names.headline(record.metrics)
    if headline is None:
        return f"measured ({seconds})"
    return f"{names.metrics[headline].label} {names.metrics[headline].text(record.metrics[headline])} ({seconds})"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
