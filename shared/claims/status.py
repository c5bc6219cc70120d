"""What the evidence says of a claim: the status is derived here and never typed.

Only run records of scale full, of the claim's own config (by hash), selection, variant and seeds count, three seeds at
least. Evidence whose config hash is not the present one is stale: it is shown and never counts.
"""

import functools
from hashlib import sha256

from shared.claims.compose import row_config
from shared.claims.evidence import Evidence, Records
from shared.claims.ledger import Model, agrees
from shared.errors import UserError
from shared.metrics.names import load_names
from shared.metrics.seeds import Estimate, interval, paired
from shared.records import record_path

MINIMUM_SEEDS, LEVEL = 3, 0.05
FROM_FULL_SCALE = ("reproduced", "below", "above", "contradicted")
UNKNOWN = "the paper's number is not known"
ROUNDING = 1e-9  # of a claimed number: |76.5 - 76.2| must not exceed 0.3 by an error of float64


class Derived:
    """A claimed row's status and what it rests on; UserError where the status in the ledger does not follow.

    ``measured``, ``gains`` (over the baseline's row) and ``settings`` (the claim's further configs, by row) are in the
    paper's units, by our metric names; ``counts`` holds parameters and FLOPs as counted here, and whether they agree,
    by the claim's keys. ``evidence`` and ``results`` are what the ledger is to list.
    """

    def __init__(self, evidence: Evidence, model: Model):
        self.model, self.claim, row, self.planned = model, model.Claim, model.Claim.Row, evidence.ledger.planned
        self.full, self.demo = evidence.records("full", row), evidence.records("demo", row, "scale=demo")
        self.ours = self.full.of_claim(self.claim)
        self.n, self.measured = len(self.ours.fresh), self._intervals(self.ours)
        others = [other for other in model.rows if other != row]
        settings = {other: evidence.records("full", other).under(self.claim.Selection) for other in others}
        self.settings = {other: self._intervals(records) for other, records in settings.items()}
        self.counts = {}
        for key, known in self.claim.numbers(counted=True).items():
            count = evidence.paper.count(row_config(evidence.paper, row, 0))[known.names[0]]
            self.counts[key] = count, agrees(self.claim.Metrics[key], count, known.unit)
        self.scores = self.claim.numbers(counted=False)
        self.gains = self._gains(evidence)
        defined = [self.ours.values(known.names[0]).keys() for known in self.scores.values()]
        self.undefined = sorted({seed for seeds in defined for seed in self.ours.fresh.keys() - seeds})
        self.status, self.why, rests_on = self._status()
        rows = [(record.scale, row, seed) for seed, record in sorted(rests_on.fresh.items())]
        paths = [record_path(evidence.results, *place) for place in rows]
        files = {str(path).removeprefix(f"{evidence.paper.root}/"): path.read_bytes() for path in paths}
        self.evidence = [{"File": file, "SHA256": sha256(text).hexdigest()} for file, text in files.items()]
        means = {name: round(values.mean, 6) for name, values in self.measured.items()}
        task, dataset = self.claim.Source.table, model.Metadata.get("Training Data")
        result = {"Task": task, "Dataset": dataset or task, "Metrics": means, "Seeds": sorted(self.ours.fresh)}
        self.results = [result] if means else []
        if not evidence.overrides:  # the file speaks of the records kept in the repository
            self._check_typed(f"{evidence.paper.name}/metafile.yml: status {self.claim.Status} of row {row}")

    def _intervals(self, records: Records) -> dict[str, Estimate]:
        """Return the claimed metrics and, beside those of a chosen epoch, the last one's as ``<metric>_last``."""
        ends = {"", "" if self.claim.Selection == "last-epoch" else "_last"}
        keys = [load_names().claims[key] for key in self.claim.Metrics]
        units = {f"{name}{end}": key.unit for key in keys for name in key.names for end in ends}
        values = {name: list(records.values(name, unit).values()) for name, unit in units.items()}
        return {name: interval(seeds) for name, seeds in values.items() if seeds}

    def _gains(self, evidence: Evidence) -> dict[str, Estimate]:
        """Return the differences with the baseline's ``Row``, or with the claim that the baseline's name means.

        A name means a model or a row by that name, or a row of the same table. Both are under the claim's selection.
        """
        baseline, table = self.claim.Baseline, self.claim.Source.table
        row, others = baseline.Row, [model for model in evidence.ledger.Models if model is not self.model]
        for model in others if row is None else ():
            source = model.Claim.Source
            if baseline.name in (model.Name, model.Claim.Row) or (table, baseline.name) == (source.table, source.row):
                row = row or model.Claim.Row
        if row is None:
            return {}
        theirs = evidence.records("full", row).under(self.claim.Selection)
        for claim in (model.Claim for model in others if model.Claim.Row == row):
            theirs = theirs.of_claim(claim, self.claim.Selection)
        units = {known.names[0]: known.unit for known in self.scores.values()}
        gains = {name: paired(self.ours.values(name, unit), theirs.values(name, unit)) for name, unit in units.items()}
        return {name: gain for name, gain in gains.items() if gain.n}

    @property
    def compared(self) -> int:
        """How many of the row's planned comparisons have the seeds that they need."""
        theirs, enough = self.claim.Baseline.Metrics, {n for n, gain in self.gains.items() if gain.n >= MINIMUM_SEEDS}
        return sum(isinstance(theirs.get(key), int | float) for key, of in self.scores.items() if of.names[0] in enough)

    def _status(self) -> tuple[str, str | None, Records]:
        """Return the status, its reason, and the records that it rests on."""
        if not self.scores and self.n:
            return "blocked", UNKNOWN, self.ours
        if self.n >= MINIMUM_SEEDS and not self.undefined:
            return self._earned(), self.claim.Why, self.ours
        if self.claim.Status == "blocked" and self.claim.Why != UNKNOWN:
            return "blocked", self.claim.Why, Records({}, {})
        return "demo" if self.demo.fresh else "not-run", self.claim.Why, self.demo

    def _earned(self) -> str:
        """Return the status that three seeds and more give; parameters and FLOPs are no part of it (``reason``).

        "contradicted": a score's claimed order is reversed, at 95 % for all planned comparisons together (Bonferroni).
        """
        gaps = []
        for key, name in ((key, known.names[0]) for key, known in self.scores.items()):
            claimed, theirs, gain = self.claim.Metrics[key], self.claim.Baseline.Metrics.get(key), self.gains.get(name)
            if isinstance(theirs, int | float) and theirs != claimed and gain and gain.n >= MINIMUM_SEEDS:
                is_reversed = gain.mean < 0 if claimed > theirs else gain.mean > 0
                if is_reversed and gain.p_value <= LEVEL / self.planned:
                    return "contradicted"
            gap = self.measured[name].mean - claimed
            gaps.append(gap if abs(gap) > self.claim.Tolerance[key] + ROUNDING * abs(claimed) else 0)
        return "below" if min(gaps) < 0 else "above" if max(gaps) > 0 else "reproduced"

    @property
    def reason(self) -> str:
        """The typed reason, which counts differ beside a status that was earned, which evidence does not count."""
        reasons = [self.why] if self.why else []
        reasons += [f"{key} differs" for key, (_, agreed) in self.counts.items() if self.n and not agreed]
        runs, claim = self.full.fresh.values(), self.claim
        selections = {run.selection for run in runs if run.under(claim.Selection) is None}
        for what, others in (("selection", selections), ("variant", {run.variant for run in runs} - {claim.Variant})):
            reasons += [f"evidence with {what} {other} does not count" for other in sorted(others)]
        reasons += [self.full.skipped] if self.full.skipped else []
        reasons += [f"the training of seed {seed} diverged" for seed in sorted(self.full.diverged)]
        if 0 < self.n < MINIMUM_SEEDS:
            reasons.append(f"{self.n} of at least {MINIMUM_SEEDS} seeds")
        if self.undefined:
            reasons.append(f"a claimed metric is undefined for seed {', '.join(map(str, self.undefined))}")
        return "; ".join(reasons)

    def _check_typed(self, start: str) -> None:
        """Raise UserError where the status in the file was typed, not derived, or has lost its evidence."""
        typed, status, files = self.claim.Status, self.status, self.claim.Evidence
        if typed == status:
            return
        if typed in ("demo", *FROM_FULL_SCALE):
            is_lost = status == "not-run" or (status == "demo" and typed in FROM_FULL_SCALE)
            if is_lost and (self.full.stale or self.demo.stale):
                what = "rests on stale evidence (its config hash is not the present one)"
                raise UserError(f"{start} {what}: run the row again or write Status: {status}.")
            if is_lost or not files:
                raise UserError(f"{start} has no evidence: run the row or write Status: {status}.")
        if files and files == self.evidence:
            raise UserError(f"{start} does not follow from its evidence: write Status: {status}.")


@functools.cache
def derive(evidence: Evidence) -> list[Derived]:
    """Return what the evidence says of every claimed row, in the ledger's order; UserError as ``Derived``."""
    return [Derived(evidence, model) for model in evidence.ledger.Models]
