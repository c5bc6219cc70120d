"""From rows and seeds to jobs: what is missing, what it will cost, and running it through Hydra's launchers."""

import importlib
import logging
import time
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks  # a launcher asks for it and has no public form of it
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from shared.errors import UserError
from shared.metrics.ledger import load_ledger, load_names
from shared.metrics.record import read_record
from shared.run.config import (
    SCALES,
    config_folder,
    hash_of,
    quoted,
    repository_root,
    require_row,
    row_config,
    row_overrides,
)
from shared.run.job import evidence_path, has_evidence, task

log = logging.getLogger(__name__)
# What a run's seconds depend on, as far as a paper has it.
COSTS = ("model", "method", "objective", "task", "optim", "scale")
DATA_COSTS = ("manifest", "train_images", "image_size")


def rows_of(paper: str, scale: str) -> list[str]:
    """Return the rows of a scale in the ledger's order; for full the claims come first, those blocked left out."""
    if scale not in SCALES:
        raise UserError(f"there is no scale {scale!r}: choose one of {', '.join(SCALES)}")
    ledger = load_ledger(repository_root(), paper)
    own = [row.Row for row in getattr(ledger, scale.capitalize())]
    if scale != "full":
        return own
    claims = [model for model in ledger.Models if model.Claim.Status != "blocked"]
    return [Path(config).stem for model in claims for config in model.configs] + own


def plan(
    paper: str, scale: str, rows: list[str] | None, seeds: list[int] | None, overrides: list[str]
) -> list[tuple[list[str], object]]:
    """Return (overrides, config) of every row and seed without evidence, seed by seed.

    Seeds go round the outside: stopped half-way, every row has been measured as often as the others.
    Raises UserError for an unknown row, a row of another scale, and overrides that would put other numbers in
    the place of the evidence kept in the repository.
    """
    config_folder(paper)
    rows = rows or rows_of(paper, scale)
    for row in rows:
        require_row(paper, row)
    first = {row: row_config(paper, row, 0, overrides) for row in rows}
    for row, cfg in first.items():
        if cfg.scale.name != scale:
            raise UserError(
                f"row {row!r} belongs to scale {cfg.scale.name}, not {scale}: say SCALE={cfg.scale.name}"
            )
        own = row_config(paper, row, 0)
        if cfg.paths.results == own.paths.results and hash_of(cfg) != hash_of(own):
            raise UserError(
                f"{' '.join(overrides)}: this measures something else than row {row!r}: say where its records go "
                "with RESULTS= (--results)"
            )
    wanted = seeds or sorted({seed for cfg in first.values() for seed in cfg.launcher.seeds})
    jobs = []
    for seed in wanted:
        for row, cfg in first.items():
            if seeds or seed in cfg.launcher.seeds:
                cfg = cfg.copy()
                cfg.seed = seed
                if not has_evidence(cfg):
                    jobs.append((row_overrides(paper, row, seed, overrides), cfg))
    return jobs


def spoken(seconds: float) -> str:
    """Return a duration as people say it."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def cost(paper: str, jobs: list) -> float:
    """Return the seconds that the jobs will take one after the other, three timed steps per kind of network.

    A row that cannot start says so when its job runs, and the others go on. Where none can, what is wrong
    with the first one is raised here, before anything is launched.
    """
    train = importlib.import_module(f"{paper}.train")
    kinds: dict[str, list[DictConfig]] = {}
    for _, cfg in jobs:
        kind = OmegaConf.to_yaml(
            OmegaConf.create([cfg.get(part) for part in COSTS] + [cfg.data.get(part) for part in DATA_COSTS])
        )
        kinds.setdefault(kind, []).append(cfg)
    total, timed, errors = 0.0, 0, []
    for members in kinds.values():
        for cfg in {cfg.row: cfg for cfg in members}.values():
            try:
                total += len(members) * train.seconds_of_run(cfg)
                timed += 1
                break
            except Exception as error:  # the job will raise it again
                errors.append(error)
    if not timed:
        raise errors[0]
    return total


def announced(cfg: DictConfig) -> str:
    """Run a job and log one line: row, seed, the first of its metrics, and how long it took."""
    begin = time.perf_counter()
    outcome = task(cfg)
    if outcome == "measured":
        metrics, known = read_record(evidence_path(cfg)).metrics, load_names().metrics
        name = next((name for name in known if isinstance(metrics.get(name), float)), None)
        if name is not None:
            value = metrics[name] * known[name].factor
            outcome = f"{known[name].label} {value:.{known[name].digits}f}"
        outcome += f" ({spoken(time.perf_counter() - begin)})"
    log.info("%s seed %d: %s", cfg.row, cfg.seed, outcome)
    return outcome


def launch(paper: str, jobs: list, launcher: str) -> list[tuple[str, JobReturn]]:
    """Run the jobs through a Hydra launcher; a failed one is reported and the others go on.

    Raises UserError for a launcher that is not installed.
    """
    if not jobs:
        return []
    folder = config_folder(paper)
    runs = repository_root() / jobs[0][1].paths.runs
    base = [
        "hydra.mode=MULTIRUN",
        f"hydra/launcher={launcher}",
        f"hydra.sweep.dir={quoted(f'{runs}/hydra')}",
        "hydra.sweep.subdir=${hydra.job.num}",
        "hydra.job.chdir=false",
        f"hydra.job.name={paper}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    # It stays open because the launcher composes the config of every job.
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            cfg = loader.load_configuration("train", base, run_mode=RunMode.MULTIRUN)
        except HydraException as error:
            raise UserError(
                f"there is no launcher {launcher!r}: say LAUNCHER=basic, or install the Hydra plugin that has it "
                "(submitit_slurm: pip install hydra-submitit-launcher)"
            ) from error
        context = HydraContext(config_loader=loader, callbacks=Callbacks(cfg))
        plugin = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=announced, config=cfg
        )
        names = [f"{cfg.row} seed {cfg.seed}" for _, cfg in jobs]
        return list(zip(names, plugin.launch([o for o, _ in jobs], initial_job_idx=0), strict=True))


def failures(returns: list[tuple[str, JobReturn]]) -> list[tuple[str, BaseException]]:
    """Return name and exception of the jobs that did not complete."""
    return [(name, r._return_value) for name, r in returns if r.status != JobStatus.COMPLETED]
