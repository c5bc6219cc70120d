"""`make reproduce-<paper>`: the rows and seeds without evidence, what they cost, one Hydra multirun, the table."""

import functools
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from shared.claims.compose import (
    SCALES,
    expected_hash,
    require_row,
    row_config,
    row_overrides,
)
from shared.claims.ledger import load_ledger
from shared.claims.protocol import Paper
from shared.errors import RunInterrupted, UserError
from shared.training.config import has_evidence, hash_of, run_folder

log = logging.getLogger(__name__)
# What a run's seconds depend on, as far as a paper has it.
COSTS = ("model", "method", "objective", "task", "optim", "scale")
DATA_COSTS = ("manifest", "train_images", "image_size")


@dataclass(frozen=True)
class Job:
    """A row and a seed that have no evidence."""

    row: str
    seed: int
    cfg: DictConfig


def rows_of(paper: Paper, scale: str) -> list[str]:
    """Return the rows of a scale in the ledger's order; for full the claims come first, those blocked left out."""
    if scale not in SCALES:
        raise UserError(f"there is no scale {scale!r}: choose one of {', '.join(SCALES)}")
    ledger = load_ledger(paper.root, paper.name)
    own = [row.Row for row in ledger.rows_of_scale(scale)]
    if scale != "full":
        return own
    claims = [model for model in ledger.Models if model.Claim.Status != "blocked"]
    return [Path(config).stem for model in claims for config in model.configs] + own


def plan(
    paper: Paper, scale: str, rows: list[str] | None, seeds: list[int] | None, overrides: list[str]
) -> list[Job]:
    """Return every row and seed without evidence, seed by seed.

    Seeds go round the outside: stopped half-way, every row has been measured as often as the others.
    Raises UserError for an unknown row, a row of another scale, and overrides that would put other numbers in
    the place of the evidence kept in the repository.
    """
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
    formerly = {row.Row: row.Formerly for row in load_ledger(paper.root, paper.name).own_rows}
    wanted = seeds or sorted({seed for cfg in first.values() for seed in cfg.launcher.seeds})
    jobs = []
    for seed in wanted:
        for row, cfg in first.items():
            if seeds or seed in cfg.launcher.seeds:
                cfg = cfg.copy()
                cfg.seed = seed
                if not has_evidence(cfg) and not _has_evidence_under(formerly.get(row), cfg):
                    jobs.append(Job(row, seed, cfg))
    return jobs


def _has_evidence_under(row: str | None, cfg: DictConfig) -> bool:
    """Return whether the record of this very configuration was written under another name of its row."""
    if row is None:
        return False
    renamed = cfg.copy()
    renamed.row = row  # no part of the hash
    return has_evidence(renamed)


def cost(paper: Paper, jobs: list[Job]) -> float:
    """Return the seconds that the jobs will take one after the other, three timed steps per kind of network.

    A row that cannot start says so when its job runs, and the others go on. Where none can, what is wrong
    with the first one is raised here, before anything is launched.
    """
    kinds: dict[str, list[DictConfig]] = {}
    for job in jobs:
        cfg = job.cfg
        kind = OmegaConf.to_yaml(
            OmegaConf.create([cfg.get(part) for part in COSTS] + [cfg.data.get(part) for part in DATA_COSTS])
        )
        kinds.setdefault(kind, []).append(cfg)
    total, timed, errors = 0.0, 0, []
    for members in kinds.values():
        for cfg in {cfg.row: cfg for cfg in members}.values():
            try:
                total += len(members) * paper.seconds_of_run(cfg)
                timed += 1
                break
            except Exception as error:  # the job will raise it again
                errors.append(error)
    if not timed:
        raise errors[0]
    return total


def multiruns(jobs: list[Job]) -> list[tuple[list[str], list[int]]]:
    """Return the jobs as (rows, seeds) of Hydra sweeps over their product: one, where all rows want the same seeds.

    A row and seed of a product that has its evidence says so and ends, but one that was not asked for would be run.
    """
    seeds_of: dict[str, tuple[int, ...]] = {}
    for job in jobs:
        wanted = tuple(job.cfg.launcher.seeds)
        seeds_of[job.row] = wanted if job.seed in wanted else ()
    sweeps = []
    for wanted in dict.fromkeys(seeds_of.values()):
        members = [job for job in jobs if seeds_of[job.row] == wanted]
        rows, seeds = dict.fromkeys(job.row for job in members), dict.fromkeys(job.seed for job in members)
        sweeps.append((list(rows), list(seeds)))
    return sweeps


def launch(paper: Paper, jobs: list[Job], launcher: str, overrides: list[str]) -> int:
    """Run the jobs as a Hydra multirun of ``python -m <paper>.train``; a failed one does not keep the others from it.

    Returns the exit code: 0, 2 where every error is one that the user can fix, else 1. Raises RunInterrupted where a
    signal ended the command.
    """
    code = 0
    for rows, seeds in multiruns(jobs):
        sweep = [f"seed={','.join(map(str, seeds))}", f"+experiment={','.join(rows)}"]
        command = [*paper.command("train"), "--multirun", f"hydra/launcher={launcher}", *sweep, *overrides]
        code = max(code, _run(command), key=lambda value: (value != 0, value == 1))
    return code


def _run(command: list[str]) -> int:
    """Run a command to its end, whatever signal reaches both; RunInterrupted where one ended it."""
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C, or SIGTERM by its handler: the command got it too, or gets it now
        process.terminate()
        process.wait()
        raise
    if code < 0 or code > 128:
        raise RunInterrupted(128 - code if code < 0 else code)
    return code


def failures(jobs: list[Job]) -> dict[str, list[str]]:
    """Return the sentence of every different failure with the jobs that ended with it."""
    by_sentence: dict[str, list[str]] = {}
    for job in jobs:
        file = run_folder(job.cfg) / "failed.txt"
        if file.is_file():
            sentence = file.read_text(encoding="utf-8").partition("\n")[0]
            by_sentence.setdefault(sentence, []).append(f"{job.row} seed {job.seed}")
    return by_sentence


def hash_with(paper: Paper, overrides: list[str]):
    """Return the hash that evidence must carry, the overrides of this command included."""
    return functools.partial(expected_hash, overrides=tuple(overrides), root=paper.root)


def command_of(paper: Paper, row: str, seed: int, overrides: list[str]) -> str:
    """Return the command line that runs a row and seed by itself."""
    program = ["python", *paper.command("train")[1:]]
    return " ".join([*program, *row_overrides(paper, row, seed, overrides)])
