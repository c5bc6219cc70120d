"""`make claims` and `make report`: validate the ledgers, derive every status, write or print the tables.

python -m shared.metrics [--check | --report] [--paper NAME ...] [--root DIR]
"""

import argparse
import functools
import sys
from pathlib import Path

from rich.console import Console

from shared.errors import UserError
from shared.metrics.ledger import papers
from shared.metrics.render import tables, update
from shared.metrics.tables import default_expected_hash, rich_table


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m shared.metrics", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything is out of date")
    parser.add_argument("--report", action="store_true", help="print the tables; write nothing")
    parser.add_argument("--paper", action="append", help="only this paper (may be given again)")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository's root")
    options = parser.parse_args(arguments)
    try:
        known = papers(options.root)
        for paper in options.paper or known[:0]:
            if paper not in known:
                raise UserError(
                    f"No paper {paper!r} has a metafile.yml: there are {', '.join(known) or 'none'}."
                )
        expected_hash = functools.cache(default_expected_hash())
        if options.report:
            console = Console()
            for paper in options.paper or known:
                for block in tables(options.root, paper, expected_hash)[2].values():
                    for table in block:
                        console.print(rich_table(table))
                        for note in table.notes:
                            console.print(note, markup=False, highlight=False)
        else:
            for path in update(options.root, expected_hash, options.paper, options.check):
                print(f"rewritten: {path.relative_to(options.root)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
