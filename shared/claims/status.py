"""What the evidence says of a claim: the status is derived here and never typed.

Only run records of scale full, of the claim's own config (by hash), selection, variant and seeds count, three seeds at
least. Evidence whose config hash is not the present one is stale: it is shown and never counts.
"""

import hashlib
from dataclasses import dataclass

from shared.claims.evidence import Evidence, Records
from shared.claims.ledger import Claim, Ledger, Model, agrees
from shared.errors import UserError
from shared.metrics.names import load_names
from shared.metrics.seeds import Interval, Paired, interval, paired

MINIMUM_SEEDS = 3
FROM_FULL_SCALE = ("reproduced", "below", "above", "contradicted")
UNKNOWN = "the paper's number is not known"
ROUNDING = 1e-9  # of a claimed number: |76.5 - 76.2| must not exceed 0.3 by an error of float64


@dataclass(frozen=True)
class Derived:
    """A claim's status and what it rests on; numbers are in the paper's units, by our metric names."""

    status: str
    why: str | None
    remarks: list[str]
    evidence: list[dict]  # as the ledger lists the records
    results: list[dict]  # of the model-index
    measured: dict[str, Interval]
    counts: dict[str, tuple[float, bool]]  # claim key -> measured, agrees
    gains: dict[str, Paired]  # over the baseline's row
    settings: dict[str, dict[str, Interval]]  # of the claim's further configs, by row, as ``measured``
    n: int
    stale: list[str]  # commits

    @property
    def reason(self) -> str:
        """The typed reason and the remarks on evidence, as one text."""
        return "; ".join([*([self.why] if self.why else []), *self.remarks])


def _measured(claim: Claim, records: Records) -> dict[str, Interval]:
    keys = [load_names().claims[key] for key in claim.Metrics]
    values = {name: records.values(name, key.unit) for key in keys for name in key.names}
    return {name: interval(list(seeds.values())) for name, seeds in values.items() if seeds}


def _counts(claim: Claim, evidence: Evidence) -> dict[str, tuple[float, bool]]:
    """Return claimed parameters and FLOPs as they are counted here: claim key -> (measured, agrees)."""
    keys = claim.numbers(counted=True)
    counts = evidence.count(claim.Row) if keys else {}
    measured = {key: counts[known.names[0]] for key, known in keys.items()}
    return {key: (count, agrees(claim.Metrics[key], count, keys[key].unit)) for key, count in measured.items()}


def _baseline_row(claim: Claim, ledger: Ledger) -> str | None:
    """Return the baseline's row: its ``Row``, or that of the claim which its name means; None without either.

    A name means a model or a row by that name, or a row of the same table.
    """
    name, place = claim.Baseline.name, (claim.Source.table, claim.Baseline.name)
    for model in ledger.Models:
        other = model.Claim
        is_meant = name in (model.Name, other.Row) or (other.Source.table, other.Source.row) == place
        if claim.Baseline.Row is None and other is not claim and is_meant:
            return other.Row
    return claim.Baseline.Row


def _gains(claim: Claim, ours: Records, evidence: Evidence) -> dict[str, Paired]:
    """Return the paired differences of the scores with the baseline's row, by our name."""
    row = _baseline_row(claim, evidence.ledger)
    if row is None:
        return {}
    theirs = evidence.records("full", row)
    for model in evidence.ledger.Models:
        theirs = theirs.of_claim(model.Claim) if model.Claim.Row == row else theirs
    scores = [(known.names[0], known.unit) for known in claim.numbers(counted=False).values()]
    gains = {name: paired(ours.values(name, unit), theirs.values(name, unit)) for name, unit in scores}
    return {name: gain for name, gain in gains.items() if gain.n}


def _earned(claim: Claim, measured: dict[str, Interval], gains: dict[str, Paired]) -> str:
    """Return the status that three seeds and more give.

    "contradicted" is the claimed order reversed by a paired 95 % interval that excludes 0, for any score. Parameters
    and FLOPs are compared apart (``_remarks``).
    """
    gaps = []
    for key, known in claim.numbers(counted=False).items():
        claimed, other, gain = claim.Metrics[key], claim.Baseline.Metrics.get(key), gains.get(known.names[0])
        if isinstance(other, int | float) and other != claimed and gain and gain.n >= MINIMUM_SEEDS:
            if gain.high < 0 if claimed > other else gain.low > 0:
                return "contradicted"
        gap = measured[known.names[0]].mean - claimed
        gaps.append(gap if abs(gap) > claim.Tolerance[key] + ROUNDING * abs(claimed) else 0)
    return "below" if min(gaps) < 0 else "above" if max(gaps) > 0 else "reproduced"


def _remarks(claim: Claim, full: Records, ours: Records, undefined: list[int], counts: dict) -> list[str]:
    """Say which evidence does not count and why, and, beside a status that was earned, which counts differ."""
    remarks = [f"{key} differs" for key, (_, agreed) in counts.items() if ours.fresh and not agreed]
    for what, wanted in (("selection", claim.Selection), ("variant", claim.Variant)):
        others = {getattr(record, what) for record in full.fresh.values()} - {wanted}
        remarks += [f"evidence with {what} {other} does not count" for other in sorted(others)]
    if 0 < len(ours.fresh) < MINIMUM_SEEDS:
        remarks.append(f"{len(ours.fresh)} of at least {MINIMUM_SEEDS} seeds")
    if undefined:
        remarks.append(f"a claimed metric is undefined for seed {', '.join(map(str, undefined))}")
    return remarks


def _check_typed(file: str, claim: Claim, status: str, files: list[dict], is_stale: bool) -> None:
    """Raise UserError where the status in the file was typed, not derived, or has lost its evidence."""
    start, remedy = f"{file}: status {claim.Status} of row {claim.Row}", f"write Status: {status}."
    if claim.Status == status:
        return
    if claim.Status in ("demo", *FROM_FULL_SCALE):
        is_lost = status == "not-run" or (status == "demo" and claim.Status in FROM_FULL_SCALE)
        if is_lost and is_stale:
            what = "rests on stale evidence (its config hash is not the present one)"
            raise UserError(f"{start} {what}: run the row again or {remedy}")
        if is_lost or not claim.Evidence:
            raise UserError(f"{start} has no evidence: run the row or {remedy}")
    if claim.Evidence and claim.Evidence == files:
        raise UserError(f"{start} does not follow from its evidence: {remedy}")


def _files(evidence: Evidence, records: Records) -> list[dict]:
    paths = [evidence.path(record) for _, record in sorted(records.fresh.items())]
    root = evidence.paper.root
    return [
        {"File": path.relative_to(root).as_posix(), "SHA256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
    ]


def derive(evidence: Evidence, model: Model) -> Derived:
    """Derive status, results and evidence of a claimed row; UserError if the typed status does not follow."""
    claim, row = model.Claim, model.Claim.Row
    full, demo = evidence.records("full", row), evidence.records("demo", row, "scale=demo")
    ours = full.of_claim(claim)
    measured, counts, gains = _measured(claim, ours), _counts(claim, evidence), _gains(claim, ours, evidence)
    scores = [known.names[0] for known in claim.numbers(counted=False).values()]
    undefined = sorted({seed for name in scores for seed in ours.fresh.keys() - ours.values(name).keys()})
    status, why, rests_on = "not-run", claim.Why, Records({}, {})
    if not scores and ours.fresh:
        status, why, rests_on = "blocked", UNKNOWN, ours
    elif len(ours.fresh) >= MINIMUM_SEEDS and not undefined:
        status, rests_on = _earned(claim, measured, gains), ours
    elif claim.Status == "blocked" and claim.Why != UNKNOWN:
        status = "blocked"
    elif demo.fresh:
        status, rests_on = "demo", demo
    files, table = _files(evidence, rests_on), claim.Source.table
    _check_typed(f"{evidence.paper.name}/metafile.yml", claim, status, files, bool(full.stale or demo.stale))
    means = {name: round(over_seeds.mean, 6) for name, over_seeds in measured.items()}
    dataset = model.Metadata.get("Training Data") or table
    result = {"Task": table, "Dataset": dataset, "Metrics": means, "Seeds": sorted(ours.fresh)}
    return Derived(
        status=status,
        why=why,
        remarks=_remarks(claim, full, ours, undefined, counts),
        evidence=files,
        results=[result] if measured else [],
        measured=measured,
        counts=counts,
        gains=gains,
        settings={other: _measured(claim, evidence.records("full", other)) for other in model.rows if other != row},
        n=len(ours.fresh),
        stale=sorted({record.commit for record in full.stale.values()}),
    )


def derive_all(evidence: Evidence) -> dict[str, Derived]:
    """Return what the evidence says of every claimed row, by row; UserError as ``derive``."""
    return {model.Claim.Row: derive(evidence, model) for model in evidence.ledger.Models}
