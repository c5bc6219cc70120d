"""The command line behind `make reproduce-<paper>` and `make evaluate-<paper>`.

python -m shared.run reproduce pdml --scale lite --rows A,B --seeds 0,1 --data-root DIR [key=value ...]
"""

import argparse
import logging
import os
import sys

from rich.console import Console

from shared.errors import UserError
from shared.metrics.tables import lite_table, rich_table
from shared.run.config import papers, repository_root
from shared.run.launch import cost, failures, launch, plan

console = Console()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m shared.run", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["reproduce"])
    parser.add_argument("paper", nargs="?")
    parser.add_argument("--all", action="store_true", help="every paper that stands here")
    parser.add_argument("--scale", default="demo")
    parser.add_argument("--rows", type=lambda text: text.split(","))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--launcher", default="basic")
    parser.add_argument("--data-root", default=os.environ.get("DATA_ROOT"))
    parser.add_argument("--results", help="folder for the run records, instead of <paper>/results")
    options, overrides = parser.parse_known_args(arguments)
    if any(part.startswith("-") for part in overrides) or bool(options.paper) == options.all:
        parser.error("give one paper or --all, and overrides as key=value")
    options.overrides = overrides
    return options


def overrides_of(options: argparse.Namespace, paper: str) -> list[str]:
    found = list(options.overrides)
    if options.data_root:
        found.append(f"paths.data_root={os.path.abspath(options.data_root)}")
    if options.results:
        found += [f"paths.results={os.path.abspath(options.results)}/{paper}"]
        found += [f"paths.runs={os.path.abspath(options.results)}/{paper}/runs"]
    return found


def spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def reproduce(options: argparse.Namespace) -> int:
    code = 0
    names = papers() if options.all else [options.paper]
    for paper in names:
        jobs = plan(paper, options.scale, options.rows, options.seeds, overrides_of(options, paper))
        if jobs:
            estimate = spoken(cost(paper, jobs))
            console.print(
                f"{paper}: {len(jobs)} runs at scale {options.scale}, about {estimate} one after another"
            )
        else:
            console.print(f"{paper}: every row of scale {options.scale} has its evidence; nothing to run")
        failed = failures(launch(paper, jobs, options.launcher))
        for name, error in failed:
            console.print(f"{name} failed: {error}", style="red")
        if failed:
            code = max(code, 2 if all(isinstance(e, UserError) for _, e in failed) else 1)
    for paper in names:
        for table in lite_table(paper, repository_root(), options.scale):
            console.print(rich_table(table))
            for note in table.notes:
                console.print(note)
    return code


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        return reproduce(parse(arguments))
    except UserError as error:
        Console(stderr=True).print(str(error), style="red")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
