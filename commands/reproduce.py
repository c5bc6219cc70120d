"""`make reproduce-<paper>`: the rows and seeds without evidence, what they cost, Hydra multiruns, what failed."""

from omegaconf import DictConfig, OmegaConf

from shared.claims.compose import SCALES, row_config
from shared.claims.evidence import Evidence
from shared.claims.protocol import Paper
from shared.command_line import run_command
from shared.errors import RunInterrupted, UserError
from shared.training.config import failure_path, hash_of

# What a run's seconds depend on, as far as a paper has it.
COSTS = ("model", "method", "objective", "task", "optim", "scale", "dense")
DATA_COSTS = ("manifest", "train_images", "image_size")
Jobs = list[DictConfig]  # a row and seed each


def rows_of(paper: Paper, scale: str) -> list[str]:
    """Return the rows that run by default at a scale, in the ledger's order; for full the claims come first.

    Blocked claims and rows with ``Default: false`` are left out.
    """
    if scale not in SCALES:
        raise UserError(f"there is no scale {scale!r}: choose one of {', '.join(SCALES)}")
    claims = [model for model in paper.ledger.Models if scale == "full" and model.Claim.Status != "blocked"]
    own = [row.Row for row in paper.ledger.rows_of_scale(scale) if row.Default]
    return [row for model in claims for row in model.rows] + own


def plan(paper: Paper, scale: str, rows: list[str] | None, seeds: list[int] | None, overrides: list[str]) -> Jobs:
    """Return the configuration of every row and seed without evidence, a job each, seed by seed.

    Seeds go round the outside: stopped half-way, every row has been measured as often as the others. Raises UserError
    for an unknown row, a row of another scale, and overrides that would put other numbers in the place of the evidence
    kept in the repository.
    """
    evidence = Evidence(paper, overrides)
    first = {row: row_config(paper, row, 0, overrides) for row in rows or rows_of(paper, scale)}
    for row, cfg in first.items():
        if cfg.scale.name != scale:
            raise UserError(f"row {row!r} belongs to scale {cfg.scale.name}, not {scale}: say SCALE={cfg.scale.name}")
        own = row_config(paper, row, 0)
        if cfg.paths.results == own.paths.results and hash_of(cfg) != hash_of(own):
            what = f"this measures something else than row {row!r}"
            raise UserError(f"{' '.join(overrides)}: {what}: say where its records go with RESULTS= (--results)")
    wanted = seeds or sorted({seed for cfg in first.values() for seed in cfg.launcher.seeds})
    pairs = [(row, seed) for seed in wanted for row in first if seeds or seed in first[row].launcher.seeds]
    missing = [(row, seed) for row, seed in pairs if seed not in evidence.records(scale, row).fresh]
    return [row_config(paper, row, seed, overrides) for row, seed in missing]


def cost(paper: Paper, jobs: Jobs) -> float:
    """Return the seconds that the jobs will take one after the other, three timed steps per kind of network.

    A row that cannot start says so when its job runs, and the others go on; where none can, the first error is raised.
    """
    kinds: dict[str, Jobs] = {}
    for cfg in jobs:
        parts = [cfg.get(part) for part in COSTS] + [cfg.data.get(part) for part in DATA_COSTS]
        kinds.setdefault(OmegaConf.to_yaml(OmegaConf.create(parts)), []).append(cfg)
    costs, errors = [], []
    for members in kinds.values():
        for cfg in {cfg.row: cfg for cfg in members}.values():
            try:
                costs.append(len(members) * paper.seconds_of_run(cfg))
                break
            except Exception as error:  # the job will raise it again
                errors.append(error)
    if not costs:
        raise errors[0]
    return sum(costs)


def multiruns(jobs: Jobs) -> list[tuple[list[str], list[int]]]:
    """Return the jobs as (rows, seeds) of Hydra sweeps, one where all rows want the same seeds."""
    seeds_of: dict[str, tuple[int, ...]] = {}
    for cfg in jobs:
        seeds_of[cfg.row] = (*seeds_of.get(cfg.row, ()), cfg.seed)
    groups = dict.fromkeys(seeds_of.values())
    return [([row for row in seeds_of if seeds_of[row] == seeds], list(seeds)) for seeds in groups]


def launch(paper: Paper, jobs: Jobs, launcher: str, overrides: list[str]) -> int:
    """Run the jobs as Hydra multiruns of ``python -m <paper>.train``; a failed one does not keep the others from it.

    Returns the exit code: 0, 2 where every error is one that the user can fix, else 1. Raises RunInterrupted where a
    signal ended the command.
    """
    for cfg in jobs:
        failure_path(cfg).unlink(missing_ok=True)  # what is there afterwards is of this launch
    codes = {0}
    for rows, seeds in multiruns(jobs):
        sweep = [f"seed={','.join(map(str, seeds))}", f"+experiment={','.join(rows)}"]
        command = [*paper.command("train"), "--multirun", f"hydra/launcher={launcher}", *sweep, *overrides]
        codes.add(run_command(command))
        if max(codes) > 128:
            raise RunInterrupted(max(codes))
    texts = [failure_path(cfg).read_text(encoding="utf-8") for cfg in jobs if failure_path(cfg).is_file()]
    # Hydra ends with the first failure; a traceback, behind the sentence of any of them, is no user's error.
    if codes - {0, 2} or any(text.partition("\n")[2] for text in texts):
        return 1
    return max(codes)


def failures(jobs: Jobs) -> dict[str, list[str]]:
    """Return the sentence of every different failure with the jobs that ended with it."""
    by_sentence: dict[str, list[str]] = {}
    for cfg in jobs:
        if failure_path(cfg).is_file():
            sentence = failure_path(cfg).read_text(encoding="utf-8").partition("\n")[0]
            by_sentence.setdefault(sentence, []).append(f"{cfg.row} seed {cfg.seed}")
    return by_sentence
