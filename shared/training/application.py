"""One run: a row and a seed, from its composed configuration to its run record; and scoring a checkpoint by itself.

A paper's ``train.py`` and ``evaluate.py`` are Hydra applications. Around their ``main`` stands ``command``, which turns
a user's error into one sentence and exit code 2; ``run_job`` and ``run_evaluation`` do what is the same for all.
"""

import contextlib
import functools
import itertools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from shared.command_line import format_duration, report, run_command, silence_library_logs
from shared.environment import begin_measurement
from shared.errors import RunInterrupted, UserError
from shared.files import folder_lock, write_text
from shared.metrics.names import load_names
from shared.records import RunRecord, read_record, write_record
from shared.training.checks import check_machine, is_rank, process_rank, ranks_of
from shared.training.config import evidence_path, failure_path, has_evidence, hash_of, root_of, run_folder

log = logging.getLogger(__name__)
Train = Callable[[DictConfig, Path], dict | None]  # (cfg, run folder) -> metrics, None on ranks other than 0
Check = Callable[[DictConfig], None]
# (cfg, checkpoint, folder of the pictures) -> metrics by the names of a run
Score = Callable[[DictConfig, Path, Path], dict]


def command(main: Callable) -> Callable:
    """Decorate an application: exit code 2 and one sentence for a user's error, 1 for a failure, 130 or 143 for a stop.

    Stands above ``hydra.main``, which passes every error on where HYDRA_FULL_ERROR is set.
    """

    @functools.wraps(main)
    def run(*arguments, **options):
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            return main(*arguments, **options)
        except (Exception, KeyboardInterrupt, RunInterrupted) as error:
            sys.exit(report(error))

    return run


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
        sentence, is_users = _keep_failure(cfg, error), isinstance(error, UserError)
        if not in_sweep:  # raised, Hydra would print its overrides first
            sys.exit(report(error))
        log.error("%s seed %d failed: %s", cfg.row, cfg.seed, sentence, exc_info=not is_users)
        error.was_logged = True
        raise
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
        write_text(failure_path(cfg), "".join([" ".join(sentence.split()), "\n", *frames]))
    return sentence


def _run_in_own_process(cfg: DictConfig) -> str:
    """Run a multirun's job on several devices as a command of its own, since Lightning starts that once per device."""
    code = run_command([sys.executable, "-m", f"{cfg.paper}.train", *HydraConfig.get().overrides.task])
    if code > 128:
        raise RunInterrupted(code)
    if code:
        failed = failure_path(cfg)
        sentence = failed.read_text(encoding="utf-8").partition("\n")[0] if failed.exists() else f"code {code}"
        raise UserError(sentence) if code == 2 else RuntimeError(sentence)
    return "done"


def measure(cfg: DictConfig, train: Train, check: Check | None = None) -> str:
    """Check, train, score and record one row and seed; returns what happened in words.

    Nothing is trained where the evidence is there or another process is at work. Stale evidence is replaced only when
    the new run is whole. Of several ranks the first one holds the folder and writes the record.
    """
    if has_evidence(cfg):
        return "already measured"
    check_machine(cfg)
    if check is not None:
        check(cfg)
    folder = run_folder(cfg)
    if process_rank(cfg.trainer) > 0:
        train(cfg, folder)
        return "measured by rank 0"
    with folder_lock(folder) as is_held:
        if is_held:
            return "already measured" if has_evidence(cfg) else _record(cfg, train, folder)
    if ranks_of(cfg.trainer) > 1:  # the other ranks would wait for this one
        raise UserError(f"{folder} is in use by another run: wait for it, or give another folder as paths.runs")
    return "running elsewhere"


def _record(cfg: DictConfig, train: Train, folder: Path) -> str:
    (digest, manifest), was_started = hash_of(cfg), any(folder.rglob("last.ckpt"))
    finish = begin_measurement(root_of(cfg))
    metrics = train(cfg, folder)
    # A paper knows of checkpoints elsewhere. The seconds of a resumed run are of its last part alone.
    metrics["resumed"] = max(float(was_started), metrics.get("resumed", 0.0))
    # Paths are the machine's own: they change no number and are nobody's business.
    config = {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key != "paths"}
    record = RunRecord(
        **{key: config[key] for key in ("paper", "row", "seed", "selection", "variant")},
        scale=cfg.scale.name,
        n_test=int(metrics.pop("n_test")),
        metrics=metrics,
        config=config,
        config_sha256=digest,
        manifest_sha256=manifest,
        **finish(),
    )
    is_replaced = evidence_path(cfg).exists()
    write_record(evidence_path(cfg), record, overwrite=True)
    if is_replaced:
        log.warning("%s held evidence of another configuration; paths.results= keeps both", evidence_path(cfg))
    headline = load_names().headline(record.metrics)
    score = " ".join(load_names().cells(headline, metrics[headline])) if headline else "measured"
    return f"{score} ({format_duration(record.wall_seconds)})"


def run_evaluation(
    cfg: DictConfig,
    score: Score,
    check: Check | None = None,
    default_checkpoint: Callable[[DictConfig], Path] = lambda cfg: run_folder(cfg) / "last.ckpt",
) -> None:
    """Print the scores of ``cfg.ckpt``, or of the run's own checkpoint; pictures go to ``cfg.out`` or beside it.

    Ends the process as ``command`` does where there is an error: before anything is written, for a checkpoint that is
    missing and for a folder that holds files.
    """
    silence_library_logs()
    try:
        check_machine(cfg)
        if check is not None:
            check(cfg)
        checkpoint = Path(cfg.ckpt) if cfg.ckpt else default_checkpoint(cfg)
        folder = _picture_folder(cfg, checkpoint)
        metrics = score(cfg, checkpoint, folder)
    except Exception as error:
        sys.exit(report(error))
    table = Table("metric", "value", title=f"{cfg.row}, seed {cfg.seed}", title_justify="left")
    for name, value in metrics.items():
        table.add_row(*(cell.replace("[", "\\[") for cell in load_names().cells(name, value)))
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    console.print(table)
    for what, path in (("checkpoint", checkpoint), ("pictures", folder)):
        if path.exists():
            console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def _picture_folder(cfg: DictConfig, checkpoint: Path) -> Path:
    """Return a new folder for the pictures; UserError where the checkpoint is missing or the folder holds files."""
    if checkpoint.exists() and not checkpoint.is_file():
        raise UserError(f"{checkpoint} is not a file: name a checkpoint in it with CKPT= (ckpt=)")
    if not checkpoint.exists():
        train = f"make reproduce-{cfg.paper} SCALE={cfg.scale.name} ROWS={cfg.row} SEEDS={cfg.seed}"
        raise UserError(f"{checkpoint} is missing: train it with `{train}`, or name another one with CKPT=")
    beside = (checkpoint.with_name(f"evaluation-{number}") for number in itertools.count(1))
    folder = Path(cfg.out) if cfg.out else next(path for path in beside if not path.exists())
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not empty: give a new folder with OUT= (out=)")
    return folder
