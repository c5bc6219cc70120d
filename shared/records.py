"""The evidence of one run: one JSON file per row and seed, written atomically and only at the end.

A record says what was measured, with which configuration, code, data and machine. The hash of the
configuration covers only what can change a number: moving data or changing a logger makes nothing stale.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, field_validator

from shared.errors import UserError
from shared.files import write_text

# top-level groups that cannot change a number; everything else is hashed
EXCLUDED = ("paths", "logger", "launcher", "trainer", "output", "paper", "row", "ckpt", "out")


# By selection, what stands between a score's name and ``_best``; ``_average`` is of the moving average of the weights.
BEST = {"best-test-epoch": "", "best-ema-epoch": "_average"}
MOST_SKIPPED = 0.05  # of a training's steps: where one works, a loss or gradient that is not finite is far rarer


def is_diverged(skipped: float, steps: float) -> bool:
    """Say whether a training that skipped so many of its steps is no result; one may be skipped in any."""
    return skipped > max(1, MOST_SKIPPED * steps)


def _without_nan(value):
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunRecord(BaseModel, extra="forbid"):
    """One run of one row with one seed; null stands for a metric that is not defined (JSON has no NaN)."""

    paper: str
    row: str
    scale: str
    seed: int
    selection: str
    variant: str
    metrics: dict[str, float | list | str | None]
    n_test: int
    config: dict[str, Any]
    config_sha256: str
    commit: str
    dirty: bool
    lock_sha256: str | None
    manifest_sha256: str | None
    hardware: dict[str, Any]
    driver: str | None
    versions: dict[str, str]
    wall_seconds: float
    peak_memory_bytes: int
    energy_joules: float | None = None
    started_at: str

    @field_validator("metrics", mode="after")
    @classmethod
    def _nan_is_null(cls, metrics: dict) -> dict:
        return {name: _without_nan(value) for name, value in metrics.items()}

    def under(self, selection: str) -> "RunRecord | None":
        """Return the record as if its epoch had been chosen so, with the last one's scores as ``<score>_last``.

        None where it was not, and no score is the best of every epoch, by test images, beside the last one's.
        """
        if self.selection == selection:
            return self
        of, every = BEST.get(selection), self.config.get("output", {}).get("validate_every")
        if of is None or (self.selection, every) != ("last-epoch", 1):
            return None
        names = [name for name in self.metrics if "_average" not in name and f"{name}{of}_best" in self.metrics]
        bests = {name: self.metrics[f"{name}{of}_best"] for name in names}
        lasts = {f"{name}_last": self.metrics[f"{name}{of}"] for name in bests}
        metrics = {name: self.metrics[name] for name in self.metrics if name != "loss"} | bests | lasts
        return self.model_copy(update={"selection": selection, "metrics": metrics}) if bests else None

    @property
    def is_diverged(self) -> bool:
        """Whether the run skipped too many steps to be a result (``is_diverged``)."""
        return is_diverged(self.metrics.get("skipped_steps") or 0, self.metrics.get("steps_trained") or 0)


def record_path(results, scale: str, row: str, seed: int) -> Path:
    """Return where the evidence of a row and seed stands in a paper's folder of results."""
    return Path(results) / scale / row / f"seed{seed}.json"


def _drop(tree: dict, keys: list[str], neutral) -> None:
    head, rest = keys[0], keys[1:]
    if head not in tree:
        return
    if rest:
        if isinstance(tree[head], dict):
            _drop(tree[head], rest, neutral)
            if not tree[head]:  # a group that only held neutral keys is as good as absent
                del tree[head]
    elif tree[head] == neutral and isinstance(tree[head], bool) == isinstance(neutral, bool):
        del tree[head]


def config_sha256(config: dict, neutral: dict[str, Any] | None = None) -> str:
    """Return the sha256 of all in a resolved config that can change a number, as JSON with sorted keys.

    The top-level keys EXCLUDED are left out, and so is every dotted key of ``neutral`` while it has its neutral value.
    The caller puts ``manifest_sha256`` under ``data``.
    """
    kept = json.loads(json.dumps({key: value for key, value in config.items() if key not in EXCLUDED}))
    for dotted, value in (neutral or {}).items():
        _drop(kept, dotted.split("."), value)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(path, record: RunRecord, overwrite: bool = False) -> None:
    """Write a record so that at any moment the file is whole or absent; UserError if it is there already."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} already holds evidence: delete it first if the run is to be repeated.")
    write_text(path, json.dumps(record.model_dump(), indent=1, sort_keys=True) + "\n")


def read_record(path) -> RunRecord:
    """Read a record; UserError that names the file if it is absent, truncated or malformed."""
    remedy = "delete it and run the row again, or restore it with git checkout."
    try:
        return RunRecord.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the row first.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is not a run record ({where}: {first['msg']}): {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not JSON ({error}): {remedy}") from error
