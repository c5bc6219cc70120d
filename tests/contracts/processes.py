"""Applications of papers as a shell runs them: exit code, standard output and error, in processes of their own.

Importing torch takes seconds. ``run_application`` therefore forks from a server that has imported the papers and
computed nothing; ``start_command`` starts a process from nothing, as torchrun and Lightning do.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from shared.claims.protocol import Paper
from shared.environment import repository_root
from shared.testing.applications import Finished

SERVER = multiprocessing.get_context("forkserver")


def preload(papers: list[Paper]) -> None:
    """Import the applications of papers once, for all commands that follow."""
    roots = dict.fromkeys([str(repository_root()), *(str(paper.root) for paper in papers)])
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    modules = [f"{paper.name}.{name}" for paper in papers for name in ("train", "evaluate")]
    SERVER.set_forkserver_preload([__name__, *modules])


def _application(module: str, arguments: list[str], cwd: Path, environment: dict[str, str], where: str) -> None:
    import torch

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{where}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def run_application(paper: Paper, name: str, *arguments: str, cwd: Path | None = None, **environment: str) -> Finished:
    """Return how ``python -m <paper>.<name> arguments`` ends."""
    with TemporaryDirectory() as where:
        environment = {**os.environ, **environment}  # the server's is that of its start
        line = (f"{paper.name}.{name}", list(arguments), cwd or repository_root(), environment, where)
        process = SERVER.Process(target=_application, args=line)
        process.start()
        process.join()
        out, err = (Path(where, stream).read_text(encoding="utf-8") for stream in ("out", "err"))
        return Finished(process.exitcode, out, err)


def start_command(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """Start ``python arguments`` on the loopback interface, one thread a process."""
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    where = {"cwd": cwd or repository_root(), "env": os.environ | settings}
    return subprocess.Popen([sys.executable, *arguments], **where, **streams)


def finish(*processes: subprocess.Popen) -> list[Finished]:
    """Wait for commands that run side by side."""
    ends = [process.communicate() for process in processes]
    return [Finished(p.returncode, out, err) for p, (out, err) in zip(processes, ends, strict=True)]
