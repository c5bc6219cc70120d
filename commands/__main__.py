"""The commands behind the Makefile: tables of claims, reproduction, evaluation, one row, data.

python -m commands tables [--check | --report] [--paper NAME ...]
python -m commands reproduce pdml --scale lite --rows A,B --seeds 0,1 --data-root DIR [key=value ...]
python -m commands evaluate pdml --row A --seed 0 [--ckpt FILE] [--out DIR] --data-root DIR [key=value ...]
python -m commands show pdml --row A [key=value ...]
python -m commands data-check --data-root DIR

Tables go to standard output, the one sentence about an error to standard error.
"""

import logging
import os
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table as RichTable

from commands.data_check import check_all, summary_of, table_of
from commands.reproduce import cost, failures, launch, plan
from shared.claims.compose import compose, quoted, row_config, row_overrides
from shared.claims.evidence import Evidence
from shared.claims.ledger import Ledger
from shared.claims.pages import paper_pages, update
from shared.claims.protocol import Paper, load_paper, paper_names
from shared.claims.status import derive
from shared.claims.tables import LINE, Table, claims_table, own_tables
from shared.command_line import Parser, format_duration, print_error, report, run_command, silence_library_logs
from shared.environment import repository_root
from shared.errors import RunInterrupted, UserError
from shared.metrics.names import load_names
from shared.training.config import evidence_path, hash_of

LARGEST_SEED = 2**32 - 1


def seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > LARGEST_SEED:
        raise ArgumentTypeError(f"{text!r} is no seed: give whole numbers from 0 to {LARGEST_SEED}, such as 0,1,2")
    return int(text)


def parse(arguments: list[str]) -> Namespace:
    where, paths, one_row = (Parser(add_help=False) for _ in range(3))
    where.add_argument("--root", type=Path, default=repository_root(), help="the folder of the papers")
    paths.add_argument("--data-root", default=os.environ.get("DATA_ROOT"), help="folder of the data, else DATA_ROOT")
    paths.add_argument("--results", help="folder for records and runs, instead of <paper>/results and runs")
    one_row.add_argument("paper")
    one_row.add_argument("--row", required=True)
    one_row.add_argument("--seed", type=seed, default=0)
    parser = Parser(prog="python -m commands", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("tables", parents=[where], help="derive every status and write the tables")
    table.add_argument("--check", action="store_true", help="write nothing; fail if anything is out of date")
    table.add_argument("--report", action="store_true", help="print the tables; write nothing")
    table.add_argument("--paper", action="append", help="only this paper (may be given again)")
    train = commands.add_parser("reproduce", parents=[where, paths], help="run what has no evidence")
    train.add_argument("paper", nargs="?")
    train.add_argument("--all", action="store_true", help="every paper")
    train.add_argument("--scale", default="demo")
    train.add_argument("--rows", type=lambda text: [row.strip() for row in text.split(",")])
    train.add_argument("--seeds", type=lambda text: [seed(part) for part in text.split(",")])
    train.add_argument("--launcher", default="basic", help="a launcher of Hydra's, such as joblib")
    score = commands.add_parser("evaluate", parents=[where, paths, one_row], help="score a checkpoint")
    score.add_argument("--ckpt", help="a checkpoint, instead of the last one of the row and seed")
    score.add_argument("--out", help="new folder for the pictures, instead of one beside the checkpoint")
    commands.add_parser("show", parents=[where, paths, one_row], help="print what a row is")
    data = commands.add_parser("data-check", parents=[where], help="check the data against the manifests")
    data.add_argument("--data-root", default=os.environ.get("DATA_ROOT"), help="folder of the data, else DATA_ROOT")
    options, overrides = parser.parse_known_args(arguments)
    options.overrides = overrides
    takes_none = options.command in ("tables", "data-check")
    for part in options.overrides:
        if part.startswith("-") or takes_none:
            raise UserError(f"unknown option {part}; see python -m commands {options.command} --help")
    if options.command == "reproduce" and bool(options.paper) == options.all:
        raise UserError("give one paper or --all, and overrides as key=value behind the paper")
    return options


def overrides_of(options: Namespace, paper: str) -> list[str]:
    """Return the overrides of a command line, where the data and the results are included."""
    overrides = list(options.overrides)
    if options.data_root:
        overrides.append(f"paths.data_root={quoted(os.path.abspath(options.data_root))}")
    if options.results:
        results = os.path.join(os.path.abspath(options.results), paper)
        overrides += [f"paths.results={quoted(results)}", f"paths.runs={quoted(os.path.join(results, 'runs'))}"]
    return overrides


def print_tables(tables: list[Table]) -> None:
    # A pipe has no width: tables are not to be squeezed into rich's 80 columns there.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    for table in tables:
        rich = RichTable(*table.columns, title=table.title or None, title_justify="left")
        for row in table.rows:
            rich.add_row(*[cell.replace(LINE, "\n").replace("[", "\\[") for cell in row])
        console.print(rich)
        for note in table.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def tables(options: Namespace) -> int:
    """Print the tables, or bring all files up to date with the evidence and say which have changed."""
    papers = [load_paper(options.root, name) for name in options.paper or paper_names(options.root)]
    if not options.report:
        for path in update(options.root, options.paper, options.check):
            print(f"rewritten: {path.relative_to(options.root)}")
        return 0
    for page in (page for paper in papers for page in paper_pages(Evidence(paper)).values()):
        print_tables([table for tables in page.values() for table in tables])
    return 0


def run_jobs(paper: Paper, jobs: list[DictConfig], options: Namespace) -> int:
    """Say what the jobs cost, run them and say which failed; returns the exit code."""
    if not jobs:
        print(f"{paper.name}: every row of scale {options.scale} has its evidence; nothing to run", flush=True)
        return 0
    silence_library_logs()
    try:
        estimate = format_duration(cost(paper, jobs))
    except Exception as error:
        return report(error)
    runs = f"{len(jobs)} runs at scale {options.scale}"
    print(f"{paper.name}: {runs}, about {estimate} one after another", flush=True)
    code = launch(paper, jobs, options.launcher, overrides_of(options, paper.name))
    for sentence, failed in failures(jobs).items():
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        print_error(f"{failed[0]}{more} failed: {sentence}")
    return code


def reproduce(options: Namespace) -> int:
    """Run what has no evidence and print the tables, those of papers whose runs failed too."""
    names = paper_names(options.root) if options.all else [options.paper]
    papers = [(load_paper(options.root, name), overrides_of(options, name)) for name in names]
    # All are planned first: a mistake in the command is said before anything runs.
    plans = [plan(paper, options.scale, options.rows, options.seeds, overrides) for paper, overrides in papers]
    codes = [run_jobs(paper, jobs, options) for (paper, _), jobs in zip(papers, plans, strict=True)]
    for paper, overrides in papers:
        if options.scale == "full":
            print_tables([claims_table(derive(Evidence(paper, overrides)))])
        own = paper.ledger.rows_of_scale(options.scale)
        unasked = [row.Row for row in own if not row.Default and row.Row not in (options.rows or ())]
        print_tables(own_tables(Evidence(paper, overrides), options.scale, unasked=unasked))
    return 1 if 1 in codes else max(codes, default=0)


def evaluate(options: Namespace) -> int:
    """Score by `python -m <paper>.evaluate`, whose exit code is returned."""
    paper = load_paper(options.root, options.paper)
    overrides = row_overrides(paper, options.row, options.seed, overrides_of(options, options.paper))
    paths = {"ckpt": options.ckpt, "out": options.out}
    overrides += [f"{key}={quoted(os.path.abspath(path))}" for key, path in paths.items() if path]
    compose(paper, overrides, "evaluate")
    return run_command([*paper.command("evaluate"), *overrides])


def claim_lines(ledger: Ledger, row: str) -> list[str]:
    """Return what the ledger says of a row: the claim, or what a row of our own measures."""
    for claim in (model.Claim for model in ledger.Models if row in model.rows):
        source, printed = claim.Source, ", ".join(f"{key} {value}" for key, value in claim.Metrics.items())
        paper = f"paper: {printed}; baseline {claim.Baseline.name or 'none'}"
        title = f"claim: {claim.Row} ({source.paper}, {source.table}, {source.row})"
        return [title, paper, f"status: {claim.Status}; {claim.Why}"]
    own = next(own for own in ledger.own_rows if own.Row == row)
    labels = ", ".join(load_names().metrics[name].label for name in own.Metrics)
    compared = ", ".join(own.Baseline) or "nothing"
    return [f"own row: {own.Label} ({own.Group})", f"measures: {labels}; compared with {compared}"]


def state_of(evidence: Evidence, cfg: DictConfig) -> str:
    """Return what a run's record is: measured, stale (of another configuration), diverged or not run."""
    records = evidence.records(cfg.scale.name, cfg.row)
    states = {"measured": records.fresh, "stale": records.stale, "diverged": records.diverged}
    return next((name for name, seeds in states.items() if cfg.seed in seeds), "not run")


def memory_line(paper: Paper, cfg: DictConfig) -> str:
    """Return what a device holds while a detector or a segmenter is trained, or why that is not known."""
    try:
        held = paper.memory_of(cfg)
    except Exception as error:
        return f"memory: not known, {error}"
    kept, state = (held[name] / 2**30 for name in ("kept_bytes", "state_bytes"))
    images = f"{held['images']} images of {held['height']} x {held['width']}"
    return (
        f"memory: {kept:.1f} GiB on a device for the backward pass of {images} in float32, and {state:.1f} GiB of "
        "weights, gradients and optimiser"
    )


def show(options: Namespace) -> int:
    """Print what a row is: claim, baseline, hash, evidence, command, the composed configuration, and what it costs."""
    silence_library_logs()
    paper, row, seed = load_paper(options.root, options.paper), options.row, options.seed
    overrides = overrides_of(options, paper.name)
    cfg, evidence = row_config(paper, row, seed, overrides), Evidence(paper, overrides)
    path, state = evidence_path(cfg), state_of(evidence, cfg)
    print(f"{paper.name} row {row}, seed {seed}, scale {cfg.scale.name}, variant {cfg.variant}")
    print(*claim_lines(evidence.ledger, row), f"hash: {hash_of(cfg)[0]}", f"evidence: {state} ({path})", sep="\n")
    print(f"devices: {cfg.trainer.devices * cfg.trainer.num_nodes}")
    print("command: python", *paper.command("train")[1:], *row_overrides(paper, row, seed, overrides))
    print(f"\n{OmegaConf.to_yaml(cfg, resolve=True)}", flush=True)
    if cfg.get("dense") is not None:
        print(memory_line(paper, cfg))
    try:  # last, since steps are timed
        print(f"cost: about {format_duration(paper.seconds_of_run(cfg))}")
    except Exception as error:
        print(f"cost: not known, {error}")
    return 0


def data_check(options: Namespace) -> int:
    """Print which data are there and which of them are wrong; returns the exit code."""
    papers = [load_paper(options.root, name) for name in paper_names(options.root)]
    rows = check_all(options.data_root, papers)
    wrong = [row.detail for row in rows if row.status == "wrong"]
    Console().print(table_of(rows))
    print(summary_of(rows))
    for detail in wrong:
        print_error(detail)
    return 2 if wrong else 0


COMMANDS = {"tables": tables, "reproduce": reproduce, "evaluate": evaluate, "show": show, "data-check": data_check}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 for a failure, 2 after one sentence, 130 or 143 where a signal ended it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return COMMANDS[options.command](options)
    except (Exception, KeyboardInterrupt, RunInterrupted) as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
