"""What the evidence says of a claim: the status is derived here and never typed.

Only run records of scale full, of the claim's own config (by hash), selection, variant and seeds count, three
seeds at least. Evidence whose config hash is not the present one is stale: it is shown and never counts.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shared.claims.ledger import COUNTED, Claim, EvidenceFile, Ledger, Model, Result, agrees
from shared.errors import UserError
from shared.metrics.names import load_names
from shared.metrics.seeds import Interval, Paired, interval, paired
from shared.training.record import RunRecord, read_record, record_path

MINIMUM_SEEDS = 3
FROM_FULL_SCALE = ("reproduced", "below", "above", "contradicted")
EARNED = ("demo", *FROM_FULL_SCALE)
UNKNOWN = "the paper's number is not known"
ROUNDING = 1e-9  # of a claimed number: |76.5 - 76.2| must not exceed 0.3 by an error of float64

# (paper, row, seed) -> sha256 of the present config; for a claimed row's demo with overrides=("scale=demo",)
ExpectedHash = Callable[..., str]


@dataclass(frozen=True)
class Evidence:
    """The run records of a row at one scale, by seed."""

    fresh: dict[int, RunRecord]
    stale: dict[int, RunRecord]
    paths: dict[int, Path]

    def values(self, metric: str) -> dict[int, float]:
        """Return seed -> value of a metric over the fresh records that have a number for it."""
        values = {seed: record.metrics.get(metric) for seed, record in self.fresh.items()}
        return {seed: value for seed, value in values.items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class Derived:
    """A claim's status and what it rests on; ``measured`` is in the paper's units, by our metric names."""

    status: str
    why: str | None
    remarks: list[str] = field(default_factory=list)
    evidence: list[EvidenceFile] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    measured: dict[str, Interval] = field(default_factory=dict)
    counts: dict[str, tuple[float, bool]] = field(default_factory=dict)  # claim key -> measured, agrees
    gains: dict[str, Paired] = field(default_factory=dict)  # over the baseline's row, as `measured`
    settings: dict[str, dict[str, Interval]] = field(default_factory=dict)  # of the claim's further configs, by row
    n: int = 0
    stale: list[str] = field(default_factory=list)  # commits

    @property
    def reason(self) -> str:
        """The typed reason and the remarks on evidence, as one text."""
        return "; ".join([*([self.why] if self.why else []), *self.remarks])


def collect(
    results, paper: str, scale: str, row: str, expected_hash: ExpectedHash, formerly: str | None = None
) -> Evidence:
    """Read the records of a row; UserError if one is malformed or is not what its path says.

    ``formerly``: another name under which records of this row were written.
    """
    fresh, stale, paths = {}, {}, {}
    for name in (formerly, row) if formerly else (row,):
        for path in sorted(record_path(results, scale, name, 0).parent.glob("seed*.json")):
            if not re.fullmatch(r"seed\d+\.json", path.name):
                continue
            record = read_record(path)
            if record.paper != paper or path != record_path(results, record.scale, record.row, record.seed):
                raise UserError(
                    f"{path} says it is {record.paper}/{record.scale}/{record.row} seed {record.seed}: "
                    "records are never moved or edited, so restore it with git checkout or delete it."
                )
            paths[record.seed] = path
            same = record.config_sha256 == expected_hash(paper, row, record.seed)
            (fresh if same else stale)[record.seed] = record
            (stale if same else fresh).pop(record.seed, None)
    return Evidence(fresh, stale, paths)


def counting(evidence: Evidence, claim: Claim) -> Evidence:
    """Keep the fresh records that are of the claim's selection, variant and seeds."""
    kept = {
        seed: record
        for seed, record in evidence.fresh.items()
        if seed in claim.Seeds and record.selection == claim.Selection and record.variant == claim.Variant
    }
    return Evidence(kept, evidence.stale, evidence.paths)


def _files(root, evidence: Evidence) -> list[EvidenceFile]:
    return [
        EvidenceFile(
            File=evidence.paths[seed].relative_to(root).as_posix(),
            SHA256=hashlib.sha256(evidence.paths[seed].read_bytes()).hexdigest(),
        )
        for seed in sorted(evidence.fresh)
    ]


def _claimed(claim: Claim) -> dict[str, tuple[str, float]]:
    """Return claim key -> (our name, unit) of the claimed scores that are numbers."""
    keys = {key: load_names().claims[key] for key in claim.Metrics}
    return {
        key: (known.names[0], known.unit)
        for key, known in keys.items()
        if isinstance(claim.Metrics[key], int | float) and known.names[0] not in COUNTED
    }


Count = Callable[[Model], dict[str, float]]  # parameters and FLOPs of a claimed row


def compare_counts(model: Model, count: Count) -> dict[str, tuple[float, bool]]:
    """Return claimed parameters and FLOPs as they are counted here: claim key -> (measured, agrees)."""
    names, compared = load_names(), {}
    for key, claimed in model.Claim.Metrics.items():
        name = names.claims[key].names[0]
        if name in COUNTED and isinstance(claimed, int | float):
            measured = count(model)[name]
            compared[key] = (measured, agrees(claimed, measured, names.claims[key].unit))
    return compared


def _baseline_evidence(ledger: Ledger, claim: Claim, of_row: Callable[[str], Evidence]) -> Evidence | None:
    """Return the evidence of the baseline: of its ``Row``, or of the claim that its name means; None without either.

    A name means a model or a row by that name, or a row of the same table.
    """
    claims = {model.Claim.Row: model.Claim for model in ledger.Models if model.Claim is not claim}
    row = claim.Baseline.Row
    for model in ledger.Models:
        other = model.Claim
        same_table = (other.Source.table, other.Source.row) == (claim.Source.table, claim.Baseline.name)
        if row is None and other is not claim and (claim.Baseline.name in (model.Name, other.Row) or same_table):
            row = other.Row
    if row is None:
        return None
    return counting(of_row(row), claims[row]) if row in claims else of_row(row)


def _contradicted(claim: Claim, ours: Evidence, baseline: Evidence) -> bool:
    """Say whether the claimed order is reversed by a paired 95 % interval that excludes 0, for any score."""
    for key, (name, _) in _claimed(claim).items():
        other = claim.Baseline.Metrics.get(key)
        if not isinstance(other, int | float) or other == claim.Metrics[key]:
            continue
        difference = paired(ours.values(name), baseline.values(name))
        if difference.n < MINIMUM_SEEDS:
            continue
        sign = 1 if claim.Metrics[key] > other else -1
        if sign * difference.low < 0 and sign * difference.high < 0:
            return True
    return False


def _gains(claim: Claim, ours: Evidence, baseline: Evidence | None) -> dict[str, Paired]:
    """Return the paired differences with the baseline's row by our name, in the paper's units."""
    gains = {}
    for name, unit in _claimed(claim).values() if baseline else ():
        both = ({s: v / unit for s, v in evidence.values(name).items()} for evidence in (ours, baseline))
        gains[name] = paired(*both)
    return {name: gain for name, gain in gains.items() if gain.n}


def _verdict(claim: Claim, ours: Evidence) -> str:
    """Say how the scores compare; parameters and FLOPs are compared apart (``_remarks``)."""
    verdicts = []
    for key, (name, unit) in _claimed(claim).items():
        gap = interval(list(ours.values(name).values())).mean / unit - claim.Metrics[key]
        near = abs(gap) <= claim.Tolerance[key] + ROUNDING * abs(claim.Metrics[key])
        verdicts.append(0 if near else gap)
    if all(verdict == 0 for verdict in verdicts):
        return "reproduced"
    return "below" if min(verdicts) < 0 else "above"


def _measured(model: Model, ours: Evidence) -> tuple[dict[str, Interval], list[Result]]:
    """Return intervals over seeds in the paper's units, and the same as a model-index result."""
    claim, measured = model.Claim, {}
    for key in claim.Metrics:
        known = load_names().claims[key]
        for name in known.names:
            values = [value / known.unit for value in ours.values(name).values()]
            if values:
                measured[name] = interval(values)
    if not measured:
        return {}, []
    result = Result(
        Task=claim.Source.table,
        Dataset=model.Metadata.training_data or claim.Source.table,
        Metrics={name: round(over_seeds.mean, 6) for name, over_seeds in measured.items()},
        Seeds=sorted(ours.fresh),
    )
    return measured, [result]


def _remarks(claim: Claim, full: Evidence, ours: Evidence, undefined: list[int], counts: dict) -> list[str]:
    """Say which evidence does not count and why, and, beside a status that was earned, which counts differ."""
    remarks = [f"{key} differs" for key, (_, agreed) in counts.items() if ours.fresh and not agreed]
    for what in ("selection", "variant"):
        wanted = getattr(claim, what.capitalize())
        other = sorted({getattr(r, what) for r in full.fresh.values()} - {wanted})
        remarks += [f"evidence with {what} {value} does not count" for value in other]
    if 0 < len(ours.fresh) < MINIMUM_SEEDS:
        remarks.append(f"{len(ours.fresh)} of at least {MINIMUM_SEEDS} seeds")
    if undefined:
        remarks.append(f"a claimed metric is undefined for seed {', '.join(map(str, undefined))}")
    return remarks


def _check_typed(file: str, claim: Claim, derived: Derived, is_stale: bool) -> None:
    """Raise UserError where the status in the file was typed, not derived, or has lost its evidence."""
    typed, start = claim.Status, f"{file}: status {claim.Status} of row {claim.Row}"
    if typed == derived.status:
        return
    if typed in EARNED:
        unearned = ("not-run", "demo") if typed in FROM_FULL_SCALE else ("not-run",)
        if derived.status in unearned and is_stale:
            raise UserError(
                f"{start} rests on stale evidence (its config hash is not the present one): "
                f"run the row again or write Status: {derived.status}."
            )
        if derived.status in unearned or not claim.Evidence:
            raise UserError(f"{start} has no evidence: run the row or write Status: {derived.status}.")
    if claim.Evidence and claim.Evidence == derived.evidence:
        raise UserError(f"{start} does not follow from its evidence: write Status: {derived.status}.")


def derive(root, paper: str, ledger: Ledger, model: Model, expected_hash: ExpectedHash, count: Count) -> Derived:
    """Derive status, results and evidence of a claimed row; UserError if the typed status does not follow."""
    claim, root = model.Claim, Path(root)
    results = root / paper / "results"

    def of_row(row: str) -> Evidence:
        return collect(results, paper, "full", row, expected_hash)

    full, theirs = of_row(claim.Row), _baseline_evidence(ledger, claim, of_row)
    at_demo_scale = functools.partial(expected_hash, overrides=("scale=demo",))
    demo = collect(results, paper, "demo", claim.Row, at_demo_scale)
    ours, counts, scores = counting(full, claim), compare_counts(model, count), _claimed(claim)
    undefined = sorted({s for name, _ in scores.values() for s in ours.fresh.keys() - ours.values(name).keys()})
    status, why, rests_on = "not-run", claim.Why, None
    if not scores and ours.fresh:
        status, why, rests_on = "blocked", UNKNOWN, ours
    elif len(ours.fresh) >= MINIMUM_SEEDS and not undefined:
        contradicted = theirs is not None and _contradicted(claim, ours, theirs)
        status, rests_on = "contradicted" if contradicted else _verdict(claim, ours), ours
    elif claim.Status == "blocked" and claim.Why != UNKNOWN:
        status = "blocked"
    elif demo.fresh:
        status, rests_on = "demo", demo
    measured, in_index = _measured(model, ours)
    derived = Derived(
        status=status,
        why=why,
        remarks=_remarks(claim, full, ours, undefined, counts),
        evidence=_files(root, rests_on) if rests_on else [],
        results=in_index,
        measured=measured,
        counts=counts,
        gains=_gains(claim, ours, theirs),
        settings={
            row: _measured(model, of_row(row))[0]
            for row in (Path(config).stem for config in model.configs)
            if row != claim.Row
        },
        n=len(ours.fresh),
        stale=sorted({record.commit for record in full.stale.values()}),
    )
    _check_typed(f"{paper}/metafile.yml", claim, derived, bool(full.stale or demo.stale))
    return derived
