"""The evidence for a paper: its ledger and its run records, and which of these are of the present configurations."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shared.claims.compose import row_config, row_names
from shared.claims.ledger import Claim
from shared.claims.protocol import Paper
from shared.errors import UserError
from shared.records import RunRecord, read_record
from shared.training.config import hash_of, root_of


@dataclass(frozen=True)
class Records:
    """Run records of a row at one scale, by seed; of another configuration (stale) or diverged they never count."""

    fresh: dict[int, RunRecord]
    stale: dict[int, RunRecord]
    diverged: dict[int, RunRecord] = field(default_factory=dict)

    @property
    def skipped(self) -> str:
        """Who skipped steps, in words; nothing where none did."""
        runs = {**self.fresh, **self.diverged}
        counts = {seed: runs[seed].metrics.get("skipped_steps") for seed in sorted(runs)}
        texts = [f"seed {seed}: {count:g}" for seed, count in counts.items() if count]
        return f"{len(texts)} of {len(runs)} runs skipped steps ({', '.join(texts)})" if texts else ""

    def values(self, metric: str, unit: float = 1.0) -> dict[int, float]:
        """Return seed -> value of a metric / ``unit`` over the fresh records that have a number for it."""
        values = {seed: record.metrics.get(metric) for seed, record in self.fresh.items()}
        return {seed: value / unit for seed, value in values.items() if isinstance(value, int | float)}

    def under(self, selection: str) -> "Records":
        """Keep the fresh records whose epoch is chosen so, or can be (``RunRecord.under``)."""
        views = {seed: record.under(selection) for seed, record in self.fresh.items()}
        return replace(self, fresh={seed: record for seed, record in views.items() if record is not None})

    def of_claim(self, claim: Claim, selection: str | None = None) -> "Records":
        """Keep the fresh records of the claim's variant and seeds, under ``selection`` (None: the claim's)."""
        fresh = self.under(selection or claim.Selection).fresh
        return replace(self, fresh={s: r for s, r in fresh.items() if s in claim.Seeds and r.variant == claim.Variant})


class Evidence:
    """A paper's ledger and run records under the overrides of a command line; a row's records are read once."""

    def __init__(self, paper: Paper, overrides: Sequence[str] = ()):
        self.paper, self.overrides, self.ledger = paper, tuple(overrides), paper.ledger

    @functools.cached_property
    def results(self) -> Path:
        """The folder of the records, which an override may have moved."""
        moved = [override for override in self.overrides if override.startswith("paths.")]
        if not moved:
            return self.paper.folder / "results"
        cfg = row_config(self.paper, row_names(self.paper)[0], 0, moved)
        return root_of(cfg) / cfg.paths.results

    def expected_hash(self, row: str, seed: int, *overrides: str) -> str:
        """Return the hash that a record of a row and seed must carry; UserError as ``row_config``."""
        return hash_of(row_config(self.paper, row, seed, (*self.overrides, *overrides)))[0]

    @functools.cache  # noqa: B019 (an Evidence lives as long as its command)
    def records(self, scale: str, row: str, *overrides: str) -> Records:
        """Return the records of a row at a scale, those that say its former name too.

        ``overrides`` make the row's configuration that of the scale, where it is another scale's row. UserError for a
        record that is malformed or is not what its path says.
        """
        records, names = {}, [row, *(own.Formerly for own in self.ledger.own_rows if own.Row == row and own.Formerly)]
        for path in sorted((self.results / scale / row).glob("seed*.json")):
            if not path.stem.removeprefix("seed").isdecimal():
                continue
            record = read_record(path)
            of_path = (self.paper.name, scale, path.stem) == (record.paper, record.scale, f"seed{record.seed}")
            if not of_path or record.row not in names:
                what = f"{record.paper}/{record.scale}/{record.row} seed {record.seed}"
                remedy = "records are never moved or edited, so restore it with git checkout or delete it"
                raise UserError(f"{path} says it is {what}: {remedy}.")
            records[record.seed] = record
        hashes = {seed: self.expected_hash(row, seed, *overrides) for seed in records}
        stale = {seed: record for seed, record in records.items() if record.config_sha256 != hashes[seed]}
        diverged = {seed: record for seed, record in records.items() if seed not in stale and record.is_diverged}
        fresh = {seed: record for seed, record in records.items() if seed not in (*stale, *diverged)}
        return Records(fresh, stale, diverged)

    def own(self, scale: str) -> dict[str, Records]:
        """Return the records of a scale's rows of our own, by row."""
        return {row.Row: self.records(scale, row.Row) for row in self.ledger.rows_of_scale(scale)}
