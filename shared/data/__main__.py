"""``python -m shared.data --root DIR`` (= ``make data-check``): which data are there, and are they right.

Exit code 0 when nothing that is there is wrong (missing is only said), 2 for a wrong file or a bad root.
"""

import os
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.commands import Parser, report
from shared.data.manifest import WRONG, check_all
from shared.errors import UserError

COLOURS = dict.fromkeys(("present", "recorded", "embedded", "counted"), "green") | {"missing": "yellow"}


def main(arguments: list[str] | None = None) -> int:
    """Print the table of all data files and return the exit code."""
    parser = Parser(prog="python -m shared.data", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=os.environ.get("DATA_ROOT"), help="the data root, else DATA_ROOT")
    try:
        rows = check_all(parser.parse_args(arguments).root)
    except UserError as error:
        return report(error)
    table = Table("data set", "file", "status", "detail")
    for row in rows:
        file, detail = Text(row.file, overflow="fold"), Text(row.detail, overflow="fold")
        table.add_row(row.manifest, file, Text(row.status, COLOURS.get(row.status, "red")), detail)
    Console().print(table)
    wrong = [row for row in rows if row.status in WRONG]
    missing = sum(row.status == "missing" for row in rows)
    files = sum(row.status != "embedded" for row in rows)
    print(f"{files} files and folders: {len(wrong)} wrong, {missing} missing (fine until a run needs them)")
    for row in wrong:
        print(row.detail, file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
