"""The command line behind `make reproduce-<paper>` and `make evaluate-<paper>`.

python -m shared.run reproduce pdml --scale lite --rows A,B --seeds 0,1 --data-root DIR [key=value ...]
python -m shared.run evaluate pdml --row A --seed 0 [--ckpt FILE] [--out DIR] --data-root DIR [key=value ...]

Results go to standard output; progress, warnings and the one sentence about an error to standard error.
"""

import argparse
import functools
import importlib
import itertools
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from rich.console import Console

from shared.errors import Stopped, UserError
from shared.metrics.ledger import load_names
from shared.metrics.render import tables
from shared.metrics.tables import Table, lite_table, rich_table
from shared.run.config import config_folder, expected_hash, papers, quoted, repository_root, row_config
from shared.run.job import run_folder
from shared.run.launch import cost, failures, launch, plan, spoken
from shared.run.parser import Parser

# A pipe has no width: tables are not to be squeezed into rich's 80 columns there.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
# Where Lightning warns of what is meant so: short epochs, one worker, its own use of a deprecated function, and going
# on inside an epoch, which the sampler does and Lightning does not know.
CHATTER = (
    r"lightning\.pytorch\."
    r"(utilities\._pytree|loops\.(fit_loop|training_epoch_loop)|trainer\.connectors\.data_connector)"
)
LARGEST_SEED = 2**32 - 1


def seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no seed: give whole numbers from 0 to {LARGEST_SEED}, such as 0,1,2"
        )
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    where = Parser(add_help=False)
    where.add_argument("--data-root", default=os.environ.get("DATA_ROOT"))
    where.add_argument("--results", help="folder for records and runs, instead of <paper>/results and runs")
    parser = Parser(prog="python -m shared.run", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "reproduce", parents=[where], help="run what has no evidence, print the table"
    )
    train.add_argument("paper", nargs="?")
    train.add_argument("--all", action="store_true", help="every paper that stands here")
    train.add_argument("--scale", default="demo")
    train.add_argument("--rows", type=lambda text: [row.strip() for row in text.split(",")])
    train.add_argument("--seeds", type=lambda text: [seed(part) for part in text.split(",")])
    train.add_argument("--launcher", default="basic")
    score = commands.add_parser("evaluate", parents=[where], help="score a checkpoint without training")
    score.add_argument("paper")
    score.add_argument("--row", required=True)
    score.add_argument("--seed", type=seed, default=0)
    score.add_argument("--ckpt", help="a checkpoint, instead of the last one of the row and seed")
    score.add_argument("--out", help="new folder for the pictures, instead of one beside the checkpoint")
    options, overrides = parser.parse_known_args(arguments)
    if any(part.startswith("-") for part in overrides):
        raise UserError(f"unknown option {overrides[0]}; see python -m shared.run {options.command} --help")
    if options.command == "reproduce" and bool(options.paper) == options.all:
        raise UserError("give one paper or --all, and overrides as key=value behind the paper")
    options.overrides = overrides
    return options


def overrides_of(options: argparse.Namespace, paper: str) -> list[str]:
    found = list(options.overrides)
    if options.data_root:
        found.append(f"paths.data_root={quoted(os.path.abspath(options.data_root))}")
    if options.results:
        results = os.path.join(os.path.abspath(options.results), paper)
        found += [f"paths.results={quoted(results)}", f"paths.runs={quoted(os.path.join(results, 'runs'))}"]
    return found


def quieten() -> None:
    """Silence what says nothing about a run; Lightning sets its loggers when it is imported, hence the import."""
    importlib.import_module("lightning.pytorch")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=CHATTER)
    # A failed job's sentence is printed at the end, once.
    logging.getLogger("shared.run.job").setLevel(logging.CRITICAL)
    for name in ("shared.run.launch", "shared.run.callbacks"):
        logging.getLogger(name).setLevel(logging.INFO)


def complain(text: str) -> None:
    """Print one line on standard error, however wide the terminal is."""
    line = " ".join(text.split())
    Console(stderr=True).print(line, style="red", soft_wrap=True, markup=False, highlight=False)


def show(found: list[Table]) -> None:
    for table in found:
        console.print(rich_table(table))
        for note in table.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def report_failures(failed: list[tuple[str, BaseException]]) -> int:
    """Print every different error once; returns 0 without any, 2 if the user can mend all of them, else 1."""
    by_text: dict[str, list[str]] = {}
    for name, error in failed:
        text = str(error)
        if not isinstance(error, UserError):
            text = f"{type(error).__name__}: {text}"
            if text not in by_text:
                traceback.print_exception(error)
        by_text.setdefault(text, []).append(name)
    for text, names in by_text.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        complain(f"{names[0]}{more} failed: {text}")
    if not failed:
        return 0
    return 2 if all(isinstance(error, UserError) for _, error in failed) else 1


def reproduce(options: argparse.Namespace) -> int:
    code = 0
    names = papers() if options.all else [options.paper]
    for paper in names:
        jobs = plan(paper, options.scale, options.rows, options.seeds, overrides_of(options, paper))
        if jobs:
            quieten()
            estimate = spoken(cost(paper, jobs))
            console.print(
                f"{paper}: {len(jobs)} runs at scale {options.scale}, about {estimate} one after another"
            )
        else:
            console.print(f"{paper}: every row of scale {options.scale} has its evidence; nothing to run")
        code = max(code, report_failures(failures(launch(paper, jobs, options.launcher))))
    for paper in names:
        # The hash of what has just been run, overrides included.
        hashes = functools.partial(expected_hash, overrides=tuple(overrides_of(options, paper)))
        if options.scale == "full":
            show(tables(repository_root(), paper, expected_hash)[2]["claims"])
        results = Path(options.results) / paper if options.results else None
        show(lite_table(paper, repository_root(), options.scale, hashes, results))
    return code


def metric_rows(metrics: dict) -> list[list[str]]:
    """Return label and value of every metric as the tables print them; lists one value behind the other."""
    known, rows = load_names().metrics, []
    for name, value in metrics.items():
        if name in known and isinstance(value, float):
            label, text = known[name].label, f"{value * known[name].factor:.{known[name].digits}f}"
        elif isinstance(value, list):
            label, text = f"{name} %", ", ".join("–" if v is None else f"{v * 100:.2f}" for v in value)
        else:
            label, text = name, f"{value:g}" if isinstance(value, float) else str(value)
        rows.append([label, text])
    return rows


def evaluate(options: argparse.Namespace) -> int:
    config_folder(options.paper)
    cfg = row_config(options.paper, options.row, options.seed, overrides_of(options, options.paper))
    scoring = importlib.import_module(f"{options.paper}.evaluate")
    # A paper whose runs leave their checkpoint elsewhere says where.
    found = getattr(scoring, "checkpoint_of", lambda cfg: run_folder(cfg) / "last.ckpt")
    checkpoint = Path(options.ckpt) if options.ckpt else found(cfg)
    if checkpoint.exists() and not checkpoint.is_file():
        raise UserError(f"{checkpoint} is no file: name a checkpoint in it with CKPT= (--ckpt)")
    if not checkpoint.exists():
        train = f"make reproduce-{options.paper} SCALE={cfg.scale.name} ROWS={cfg.row} SEEDS={cfg.seed}"
        raise UserError(f"{checkpoint} is missing: train it with `{train}`, or name another one with CKPT=")
    beside = (checkpoint.with_name(f"evaluation-{number}") for number in itertools.count(1))
    folder = Path(options.out) if options.out else next(path for path in beside if not path.exists())
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty: give a new folder with OUT= (--out)")
    quieten()
    metrics = scoring.evaluate_checkpoint(cfg, checkpoint, folder)
    notes = [f"checkpoint: {checkpoint}"] + ([f"pictures: {folder}"] if folder.exists() else [])
    show([Table(f"{cfg.row}, seed {cfg.seed}", ["metric", "value"], metric_rows(metrics), notes)])
    return 0


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options = parse(arguments)
        return {"reproduce": reproduce, "evaluate": evaluate}[options.command](options)
    except UserError as error:
        complain(str(error))
        return 2
    except Stopped as stop:
        complain(str(stop))
        return stop.code
    except KeyboardInterrupt:  # outside a training, which Lightning watches
        stop = Stopped(128 + signal.SIGINT)
        complain(str(stop))
        return stop.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
