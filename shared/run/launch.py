"""From rows and seeds to jobs: what is missing, what it will cost, and running it through Hydra's launchers."""

import importlib
import logging
from collections import Counter
from pathlib import Path

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import OmegaConf

from shared.errors import UserError
from shared.run.config import SCALES, compose, config_folder, repository_root, require_row, row_overrides
from shared.run.job import has_evidence, task

log = logging.getLogger(__name__)


def rows_of(paper: str, scale: str) -> list[str]:
    """Return the rows of a scale in the ledger's order: Demo, Lite, or the claims for full."""
    if scale not in SCALES:
        raise UserError(f"there is no scale {scale!r}: choose one of {', '.join(SCALES)}")
    ledger = yaml.safe_load((repository_root() / paper / "metafile.yml").read_text())
    if scale != "full":
        return [entry["Row"] for entry in ledger.get(scale.capitalize()) or []]
    configs = [c for model in ledger["Models"] for c in _listed(model["Config"])]
    return [Path(config).stem for config in configs]


def _listed(value) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def plan(
    paper: str, scale: str, rows: list[str] | None, seeds: list[int] | None, overrides: list[str]
) -> list[tuple[list[str], object]]:
    """Return (overrides, config) of every row and seed without evidence, seed by seed.

    Seeds go round the outside: stopped half-way, every row has been measured as often as the others.
    Raises UserError for an unknown row, or a row of another scale.
    """
    config_folder(paper)
    rows = rows or rows_of(paper, scale)
    for row in rows:
        require_row(paper, row)
    first = {row: compose(paper, row_overrides(paper, row, 0, overrides)) for row in rows}
    for row, cfg in first.items():
        if cfg.scale.name != scale:
            raise UserError(
                f"row {row!r} belongs to scale {cfg.scale.name}, not {scale}: say SCALE={cfg.scale.name}"
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


def cost(paper: str, jobs: list) -> float:
    """Return the seconds that the jobs will take one after the other, three timed steps per kind of network."""
    train = importlib.import_module(f"{paper}.train")

    def kind(cfg) -> str:
        return OmegaConf.to_yaml(OmegaConf.create([cfg.model, cfg.get("method"), cfg.optim, cfg.scale]))

    kinds = {kind(cfg): cfg for _, cfg in reversed(jobs)}
    seconds = {key: train.seconds_of_run(cfg) for key, cfg in kinds.items()}
    return sum(seconds[key] * n for key, n in Counter(kind(cfg) for _, cfg in jobs).items())


def launch(paper: str, jobs: list, launcher: str) -> list[tuple[str, JobReturn]]:
    """Run the jobs through a Hydra launcher; a failed one is reported and the others go on."""
    if not jobs:
        return []
    folder = config_folder(paper)
    base = ["hydra.mode=MULTIRUN", f"hydra/launcher={launcher}"]
    runs = repository_root() / jobs[0][1].paths.runs
    base += [f"hydra.sweep.dir={runs}/hydra", "hydra.sweep.subdir=${hydra.job.num}", "hydra.job.chdir=false"]
    base += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    base += ["hydra.job.name=" + paper]
    from hydra import initialize_config_dir  # here: it must stay open while the launcher composes

    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("train", base, run_mode=_multirun())
        from hydra._internal.callbacks import Callbacks

        context = HydraContext(config_loader=loader, callbacks=Callbacks(cfg))
        plugin = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=cfg
        )
        names = [f"{cfg.row} seed {cfg.seed}" for _, cfg in jobs]
        return list(zip(names, plugin.launch([o for o, _ in jobs], initial_job_idx=0), strict=True))


def _multirun():
    from hydra.types import RunMode

    return RunMode.MULTIRUN


def failures(returns: list[tuple[str, JobReturn]]) -> list[tuple[str, BaseException]]:
    """Return name and exception of the jobs that did not complete."""
    return [(name, r._return_value) for name, r in returns if r.status != JobStatus.COMPLETED]
