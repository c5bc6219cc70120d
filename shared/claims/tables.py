"""The cells of every results table, so that a README and the terminal show the same."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from shared.claims.evidence import Evidence, Records
from shared.claims.ledger import Claim, OwnRow
from shared.claims.status import Derived, derive
from shared.metrics.names import MetricName, load_names
from shared.metrics.seeds import Estimate, holm, interval, paired

NOTHING = "–"
HOLDS = " †"
LINE = "<br>"  # a new line inside a cell of Markdown; the terminal breaks the line there
PAPERS_UNIT = MetricName(label="")  # two digits of what is in the paper's unit already


@dataclass(frozen=True)
class Table:
    """A table of texts with lines that stand below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def _stale_text(records: Records) -> str:
    commits = sorted({record.commit[:7] for record in records.stale.values()})
    return f"stale (commit {', '.join(commits)})" if commits else ""


def _interval_text(values: Estimate, unit: MetricName = PAPERS_UNIT, bounds: bool = False) -> str:
    """Return "mean ± std", with " [low, high]" if asked for; a single seed shows its value alone."""
    if values.std is None:
        return unit.text(values.mean)
    ends = f" [{unit.text(values.low)}, {unit.text(values.high)}]" if bounds else ""
    return f"{unit.text(values.mean)} ± {unit.text(values.std)}{ends}"


def _difference_text(test: Estimate, unit: MetricName = PAPERS_UNIT) -> str:
    """Return a paired difference, of two seeds or more, with its sign and its interval."""
    mean = unit.text(test.mean)
    return f"{'' if mean.startswith('-') else '+'}{mean} [{unit.text(test.low)}, {unit.text(test.high)}]"


def _metric_cell(row: OwnRow, records: Records, metric: str) -> str:
    if metric not in (*row.Metrics, *row.Extra):
        return NOTHING
    values, fresh = list(records.values(metric).values()), records.fresh.values()
    texts = {record.metrics[metric] for record in fresh if isinstance(record.metrics.get(metric), str)}
    if texts or not values:
        return "; ".join(sorted(texts)) or "undefined"
    text = _interval_text(interval(values), load_names().metrics[metric])
    if best := records.values(f"{metric}_best"):
        text += f"{LINE}best scored epoch: {_interval_text(interval([*best.values()]), load_names().metrics[metric])}"
    return text if len(values) == len(fresh) else f"{text} (undefined for {len(fresh) - len(values)} seeds)"


def _row_cells(row: OwnRow, metrics: list[str], records: Records, differences: list[str]) -> list[str]:
    fresh, stale = list(records.fresh.values()), _stale_text(records)
    if not fresh:
        empty = [NOTHING] * (len(metrics) - 1 + len(differences))
        return [row.Label, stale or ("diverged" if records.diverged else "not run"), *empty, "0", NOTHING]
    # The clock of a run that was resumed has seen its last part only.
    whole = [record.wall_seconds for record in fresh if not record.metrics.get("resumed")]
    seconds = f"{interval(whole).mean:.0f}" if whole else NOTHING
    n = f"{len(fresh)} and {len(records.stale)} {stale}" if stale else str(len(fresh))
    return [row.Label, *(_metric_cell(row, records, metric) for metric in metrics), *differences, n, seconds]


def own_tables(evidence: Evidence, scale: str, only_measured: bool = False, unasked: Sequence[str] = ()) -> list[Table]:
    """Return the measured tables of a scale's own rows, one per Group of the ledger's list, in the list's order.

    A row shows mean ± standard deviation over its fresh seeds, the paired difference of every compared metric with its
    baselines, the number of seeds and the wall time. Notes that concern all groups stand in the last table.
    ``only_measured``: no row without fresh evidence or not for the README, no extra columns; corrects for all planned.
    ``unasked``: rows that are left out while they have no record.
    """
    rows, records, names = evidence.ledger.rows_of_scale(scale), evidence.own(scale), load_names().metrics
    pairs = [(row.Row, other, metric) for row in rows for other in row.Baseline for metric in row.compared]
    tests = {(a, b, metric): paired(records[a].values(metric), records[b].values(metric)) for a, b, metric in pairs}
    p_values = {key: test.p_value for key, test in tests.items() if test.n > 1}
    holding, labels, tables = holm(p_values, len(pairs)), {row.Row: row.Label for row in rows}, []

    def difference_cell(row: OwnRow, metric: str | None) -> str:
        """Return the differences with all baselines of a row, a line each."""
        lines = []
        for key in [(row.Row, other, metric) for other in row.Baseline if (row.Row, other, metric) in p_values]:
            low, high = tests[key].low, tests[key].high
            text = f"{_difference_text(tests[key], names[metric])}{HOLDS if key in holding else ''} vs {labels[key[1]]}"
            lines.append(f"{text}: no evidence" if low <= 0 <= high else text)
        return LINE.join(lines) or NOTHING

    shown = [row for row in rows if (row.Readme and records[row.Row].fresh) or not only_measured]
    shown = [row for row in shown if row.Row not in unasked or records[row.Row] != Records({}, {})]
    for group in dict.fromkeys(row.Group for row in shown):
        members = [row for row in shown if row.Group == group]
        extra = [metric for row in members for metric in row.Extra if not only_measured]
        metrics = list(dict.fromkeys([*(metric for row in members for metric in row.Metrics), *extra]))
        # Every row's first compared metric stands in the first column of differences, and so on.
        columns = list(zip_longest(*(row.compared for row in members)))
        titles = [" or ".join(dict.fromkeys(names[metric].label for metric in c if metric)) for c in columns]
        cells = []
        for row, compared in zip(members, zip(*columns, strict=True), strict=True):
            differences = [difference_cell(row, metric) for metric in compared]
            cells.append(_row_cells(row, metrics, records[row.Row], differences))
        heads = [*(names[metric].label for metric in metrics), *(f"{title}: difference [95 %]" for title in titles)]
        tables.append(Table(group, ["", *heads, "seeds", "seconds"], cells))
    if tables:
        tables[-1].notes.extend(_notes(list(records.values()), len(tests), len(p_values), len(holding)))
        skipped = [f"{labels[row]}, {of_row.skipped}" for row, of_row in records.items() if of_row.skipped]
        diverged = [f"{labels[row]}, seed {seed}" for row, of_row in records.items() for seed in of_row.diverged]
        for what, of in (("Steps that were not finite", skipped), ("Diverged, and in no mean", diverged)):
            tables[-1].notes.extend([f"{what}: {'; '.join(of)}."] if of else [])
    return tables


def _notes(rows: list[Records], planned: int, tested: int, holding: int) -> list[str]:
    """Return what concerns all tables of a list: how to read them, the corrections, machines and commits."""
    notes = ["Mean ± standard deviation over seeds."]
    if planned:
        how = 'Differences are paired by seed, in the metric\'s units; "no evidence" where their 95 % interval holds 0'
        plan = f"planned comparisons: {planned}, still open: {planned - tested}"
        notes = [f"{notes[0]} {how}; {plan}; the intervals are not corrected for their number."]
    if tested:
        correction = f"stay different from 0 at 5 % when Holm's method corrects for all {planned}"
        notes.append(f"{HOLDS.strip()} marks the comparisons that {correction}: {holding}.")
    runs = [record for row in rows for record in row.fresh.values()]
    if not runs:
        return notes
    if all(len(row.fresh) < 2 for row in rows):
        notes = ["One seed a row: no interval, and no claim is tested."]
    commits = [f"{run.commit[:7]}{' with uncommitted changes' if run.dirty else ''}" for run in runs]
    parts = [(r.hardware.get("cpu"), f"{r.hardware.get('cores')} cores", *r.hardware.get("gpus", [])) for r in runs]
    machines = [", ".join(map(str, part)) for part in parts]
    seen = [sorted(Counter(of).items()) for of in (machines, commits)]
    parts = ["; ".join(f"{name} ({n} run{'s' * (n > 1)})" for name, n in counts) for counts in seen]
    return [*notes, f"Hardware: {parts[0]}. Commits: {parts[1]}."]


def _claimed_cell(metrics: dict) -> str:
    return LINE.join(f"{key}: {'not known' if value is None else value}" for key, value in metrics.items())


def _score_lines(claim: Claim, names: list[str], measured: dict[str, Estimate]) -> list[str]:
    """Return a line a score; one of a chosen epoch says so, and the last epoch's stands below it."""
    lines, chosen = [], claim.Selection != "last-epoch"
    for name in (name for name in names if name in measured):
        label, last = load_names().metrics[name].label, measured.get(f"{name}_last")
        lines.append(f"{label}{f', {claim.Selection}' * chosen}: {_interval_text(measured[name], bounds=True)}")
        if chosen:
            lines.append(f"{label}, last epoch: {_interval_text(last, bounds=True) if last else 'not recorded'}")
    return lines


def _measured_cell(derived: Derived) -> str:
    names, lines = load_names(), []
    for key in derived.claim.Metrics:
        if key in derived.counts:
            count, agreed = derived.counts[key]
            lines.append(f"{key}: {count / names.claims[key].unit:.4g} ({'agrees' if agreed else 'differs'})")
        lines += _score_lines(derived.claim, names.claims[key].names, derived.measured)
    for name, gain in ((name, gain) for name, gain in derived.gains.items() if gain.n > 1):
        baseline = derived.claim.Baseline.Row or "the baseline"
        lines.append(f"{names.metrics[name].label} less {baseline}: {_difference_text(gain)}")
    for row, measured in derived.settings.items():
        claimed = [name for key in derived.claim.Metrics for name in names.claims[key].names]
        lines += [f"{row}: {line}" for line in _score_lines(derived.claim, claimed, measured)]
    if derived.full.stale:
        lines.append(_stale_text(derived.full))
    return LINE.join(lines) or "not run"


def claims_table(derived: list[Derived], title: str = "") -> Table:
    """Return the table of claimed rows."""
    columns = ["row", "paper", "baseline in the paper", "measured, mean ± std [95 %]", "seeds", "status", "why"]
    rows = []
    for row in derived:
        claim, baseline = row.claim, _claimed_cell(row.claim.Baseline.Metrics)
        if claim.Baseline.name:
            baseline = f"{claim.Baseline.name}{LINE}{baseline}"
        cells = [claim.Row, _claimed_cell(claim.Metrics), baseline, _measured_cell(row)]
        rows.append([*cells, str(row.n), row.status, row.reason])
    planned = derived[0].planned if derived else 0
    plan = f"planned comparisons: {planned}, still open: {planned - sum(row.compared for row in derived)}"
    return Table(title, columns, rows, [f"With the baselines of these claims, {plan}."] if planned else [])


def measured_tables(evidence: Evidence) -> list[Table]:
    """Return the tables of what was measured, claimed rows and then ours, with one line on what was not run."""
    derived = derive(evidence)
    claimed = [row for row in derived if row.n]
    tables = [claims_table(claimed, "Claimed rows")] if claimed else []
    tables += [table for scale in ("full", "lite") for table in own_tables(evidence, scale, only_measured=True)]
    tables = tables or [Table("", ["measured"], [["nothing yet"]])]
    own = [*evidence.own("full").values(), *evidence.own("lite").values()]
    tables[-1].notes.append(
        f"{len(derived) - len(claimed)} of {len(derived)} claimed rows and {sum(not row.fresh for row in own)} of "
        f"{len(own)} rows of our own were not run: [RESULTS.md](RESULTS.md)."
    )
    return tables


def _headline(evidence: Evidence) -> str:
    """Return the comparison that the ledger names as its headline, with its interval; what is missing otherwise."""
    headline, lite = evidence.ledger.Headline, {row.Row: row for row in evidence.ledger.Lite}
    if headline is None:
        return NOTHING
    row, baseline = lite[headline["Row"]], lite[headline["Baseline"]]
    metric, pair = headline.get("Metric") or row.compared[0], f"{row.Label} against {baseline.Label}"
    test = paired(*(evidence.own("lite")[name.Row].values(metric) for name in (row, baseline)))
    if test.n < 2:
        return f"{pair}: not run"
    known = load_names().metrics[metric]
    return f"{row.Group}: {pair}, {known.label}: {_difference_text(test, known)}, {test.n} seeds"


def summary_table(papers: list[Evidence]) -> Table:
    """Return one row per paper: claimed, reproduced, measured at full and small scale, headline."""
    at_scale = [f"measured at {scale} scale" for scale in ("full", "lite")]
    rows = []
    for evidence in papers:
        name, derived = evidence.paper.name, derive(evidence)
        lite = [bool(row.fresh) for row in evidence.own("lite").values()]
        counts = len(derived), sum(row.status == "reproduced" for row in derived), sum(row.n > 0 for row in derived)
        measured = f"{sum(lite)} of {len(lite)} rows"
        rows.append([f"[{name}]({name}/README.md)", *map(str, counts), measured, _headline(evidence)])
    return Table("", ["paper", "claimed rows", "reproduced", *at_scale, "headline"], rows)
