"""What command lines share: arguments, sentences on standard error, durations, a command inside a command."""

import argparse
import logging
import signal
import subprocess
import sys
import traceback
import warnings

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from shared.errors import RunInterrupted, UserError

CONFIG_ERRORS = (HydraException, OmegaConfBaseException)
GRACE = 10  # seconds after Ctrl-C for a command to end by itself, since the terminal interrupts it as well
# What Lightning warns of and is meant so: short epochs, one worker, its own use of a deprecated function, and a resumed
# run that begins inside an epoch, which the sampler knows and Lightning does not.
EXPECTED_WARNINGS = (
    r"lightning\.pytorch\."
    r"(utilities\._pytree|loops\.(fit_loop|training_epoch_loop)|trainer\.connectors\.data_connector)"
)


class Parser(argparse.ArgumentParser):
    """Raises UserError where the arguments are wrong."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def print_error(error: object) -> None:
    """Print one line on standard error."""
    sys.stderr.write(" ".join(str(error).split()) + "\n")


def config_reason(error: Exception) -> str:
    """Return in one line what is wrong with a configuration or an override, without Hydra's and OmegaConf's frames."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    return " ".join(str(cause).split("\n    full_key")[0].split()) + "; fix the key or the value"


def report(error: BaseException) -> int:
    """Print an error as its reader needs it, unless a job's log has it, and return the exit code that it means.

    A user's error is one line and 2, a signal one line and 128 + its number, anything else the traceback and 1.
    """
    if isinstance(error, KeyboardInterrupt):
        error = RunInterrupted(128 + signal.SIGINT)
    if isinstance(error, RunInterrupted):
        print_error(error)
        return error.code
    is_config = isinstance(error, CONFIG_ERRORS)
    is_users = is_config or isinstance(error, UserError)
    if not hasattr(error, "was_logged"):
        if is_users:
            print_error(config_reason(error) if is_config else error)
        else:
            traceback.print_exception(error)
    return 2 if is_users else 1


def silence_library_logs() -> None:
    """Silence what Lightning says of no consequence for a run."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=EXPECTED_WARNINGS)


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def run_command(command: list[str]) -> int:
    """Run a command to its end; returns its exit code, as a shell gives it: 128 + number where a signal ended it.

    SIGTERM is passed on to the command, Ctrl-C reaches it through the terminal; both are waited for.
    """
    process = subprocess.Popen(command)
    handler = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 128 - code if code < 0 else code
