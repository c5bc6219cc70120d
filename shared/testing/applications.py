"""Applications of papers called in the process of a test, and how a command ended."""

import contextlib
import importlib
import io
import sys
from dataclasses import dataclass

from shared.claims.protocol import Paper


@dataclass(frozen=True)
class Finished:
    """How a command ended; ``code`` is negative for a signal that it did not survive."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


def call_application(paper: Paper, name: str, *arguments: str) -> Finished:
    """Return how an application ends that is called in this process, where a test has changed something."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [f"{paper.name}.{name}", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            importlib.import_module(f"{paper.name}.{name}").main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return Finished(code, out.getvalue(), err.getvalue())
