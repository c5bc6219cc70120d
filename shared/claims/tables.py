"""The cells of every results table, so that a README and the terminal show the same."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.claims.evidence import Evidence, Records
from shared.claims.ledger import Claim, Model, OwnRow
from shared.claims.status import Derived
from shared.metrics.names import MetricName, load_names
from shared.metrics.seeds import Interval, Paired, holm, interval, paired

NOTHING = "–"
HOLDS = " †"
LINE = "<br>"  # a new line inside a cell of Markdown; the terminal breaks the line there
PAPERS_UNIT = MetricName(label="")  # two digits of what is in the paper's unit already
Tests = dict[tuple[str, str, str], Paired]  # (row, baseline, metric) -> paired test


@dataclass(frozen=True)
class Table:
    """A table of texts with lines that stand below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def _commit_text(record) -> str:
    return f"{record.commit[:7]}{' with uncommitted changes' if record.dirty else ''}"


def _stale_text(commits: Iterable[str]) -> str:
    return f"stale (commit {', '.join(sorted({commit[:7] for commit in commits}))})"


def _interval_text(values: Interval, unit: MetricName = PAPERS_UNIT, bounds: bool = False) -> str:
    """Return "mean ± std", with " [low, high]" if asked for; a single seed shows its value alone."""
    if values.std is None:
        return unit.text(values.mean)
    ends = f" [{unit.text(values.low)}, {unit.text(values.high)}]" if bounds else ""
    return f"{unit.text(values.mean)} ± {unit.text(values.std)}{ends}"


def _difference_text(test: Paired, unit: MetricName = PAPERS_UNIT) -> str:
    """Return a paired difference with its sign, and with its interval where there is one."""
    mean = unit.text(test.mean)
    ends = f" [{unit.text(test.low)}, {unit.text(test.high)}]" if test.n > 1 else ""
    return f"{'' if mean.startswith('-') else '+'}{mean}{ends}"


def _metric_cell(row: OwnRow, records: Records, metric: str) -> str:
    if metric not in (*row.Metrics, *row.Extra):
        return NOTHING
    texts = {value for record in records.fresh.values() if isinstance(value := record.metrics.get(metric), str)}
    values = records.values(metric)
    if texts or not values:
        return "; ".join(sorted(texts)) or "undefined"
    text, missing = (
        _interval_text(interval(list(values.values())), load_names().metrics[metric]),
        len(records.fresh) - len(values),
    )
    return f"{text} (undefined for {missing} seeds)" if missing else text


def _paired_tests(rows: list[OwnRow], records: dict[str, Records]) -> Tests:
    """Return the planned tests of all rows against their baselines; ``n`` of one may be 0."""
    return {
        (row.Row, baseline, metric): paired(records[row.Row].values(metric), records[baseline].values(metric))
        for row in rows
        for baseline in row.Baseline
        for metric in row.compared
    }


def _difference_cell(row: OwnRow, metric: str, tests: Tests, holding: set, labels: dict[str, str]) -> str:
    """Return the differences with all baselines of a row, a line each; a mark where Holm's correction leaves one."""
    lines = []
    for key in ((row.Row, baseline, metric) for baseline in row.Baseline):
        if tests[key].n:
            text = _difference_text(tests[key], load_names().metrics[metric])
            text += f"{HOLDS if key in holding else ''} vs {labels[key[1]]}"
            is_open = tests[key].n > 1 and tests[key].low <= 0 <= tests[key].high
            lines.append(f"{text}: no evidence" if is_open else text)
    return LINE.join(lines) or NOTHING


def _row_cells(row: OwnRow, metrics: list[str], records: Records, differences: list[str]) -> list[str]:
    fresh, stale = list(records.fresh.values()), ""
    if records.stale:
        stale = _stale_text(record.commit for record in records.stale.values())
    if not fresh:
        empty = [NOTHING] * (len(metrics) - 1 + len(differences))
        return [row.Label, stale or "not run", *empty, "0", NOTHING]
    # The clock of a run that was resumed has seen its last part only.
    whole = [record.wall_seconds for record in fresh if not record.metrics.get("resumed")]
    seconds = f"{interval(whole).mean:.0f}" if whole else NOTHING
    n = f"{len(fresh)} and {len(records.stale)} {stale}" if stale else str(len(fresh))
    return [row.Label, *(_metric_cell(row, records, metric) for metric in metrics), *differences, n, seconds]


def own_tables(evidence: Evidence, scale: str, only_measured: bool = False) -> list[Table]:
    """Return the measured tables of a scale's own rows, one per Group of the ledger's list, in the list's order.

    A row shows mean ± standard deviation over its fresh seeds, the paired difference of every compared metric with
    its baselines, the number of seeds and the wall time. Notes that concern all groups stand in the last one.
    ``only_measured`` leaves out rows without fresh evidence and extra columns; the corrections are for the
    comparisons of all rows all the same.
    """
    rows, names = evidence.ledger.rows_of_scale(scale), load_names().metrics
    records = {row.Row: evidence.records(scale, row.Row) for row in rows}
    tests, labels, tables = _paired_tests(rows, records), {row.Row: row.Label for row in rows}, []
    p_values = {key: test.p_value for key, test in tests.items() if test.n > 1}
    holding = holm(p_values)
    shown = [row for row in rows if records[row.Row].fresh or not only_measured]
    for group in dict.fromkeys(row.Group for row in shown):
        members = [row for row in shown if row.Group == group]
        extra = [metric for row in members for metric in row.Extra if not only_measured]
        metrics = list(dict.fromkeys([*(metric for row in members for metric in row.Metrics), *extra]))
        # Every row's first compared metric stands in the first column of differences, and so on.
        compared = list(itertools.zip_longest(*(row.compared for row in members)))
        columns = ["", *(names[metric].label for metric in metrics)]
        for column in compared:
            label = " or ".join(dict.fromkeys(names[metric].label for metric in column if metric))
            columns.append(f"{label}: difference [95 %]")
        cells = []
        for row, of_row in zip(members, zip(*compared, strict=True), strict=True):
            differences = [_difference_cell(row, m, tests, holding, labels) if m else NOTHING for m in of_row]
            cells.append(_row_cells(row, metrics, records[row.Row], differences))
        tables.append(Table(group, [*columns, "seeds", "seconds"], cells))
    if tables:
        tables[-1].notes.extend(_notes(list(records.values()), len(tests), len(p_values), len(holding)))
    return tables


def _notes(rows: list[Records], planned: int, tested: int, holding: int) -> list[str]:
    """Return what concerns all tables of a list: how to read them, the corrections, machines and commits."""
    runs = [record for row in rows for record in row.fresh.values()]
    made = f"{tested} of {planned} paired comparisons, the others are not measured yet"
    notes = [
        "Mean ± standard deviation over seeds; differences are paired by seed, in the metric's units, and "
        '"no evidence" where their 95 % interval holds 0. '
        f"These tables hold {made if tested != planned else f'{tested} paired comparisons'}; their 95 % intervals "
        "are not corrected for that number."
    ]
    if tested:
        notes.append(
            f"{HOLDS.strip()} marks the {holding} that stay different from 0 at 5 % when Holm's method "
            "corrects for that number."
        )
    if not runs:
        return notes
    if all(len(row.fresh) < 2 for row in rows):
        notes = ["One seed a row: no interval, and no claim is tested."]
    machines = Counter(
        ", ".join([str(run.hardware.get("cpu")), f"{run.hardware.get('cores')} cores", *run.hardware.get("gpus", [])])
        for run in runs
    )
    counters = machines, Counter(map(_commit_text, runs))
    hardware, commits = ("; ".join(f"{name} ({n} runs)" for name, n in sorted(seen.items())) for seen in counters)
    return [*notes, f"Hardware: {hardware}. Commits: {commits}."]


def _claimed_cell(metrics: dict) -> str:
    return LINE.join(f"{key}: {'not known' if value is None else value}" for key, value in metrics.items())


def _measured_cell(claim: Claim, derived: Derived) -> str:
    names, lines = load_names(), []
    for key in claim.Metrics:
        if key in derived.counts:
            measured, agreed = derived.counts[key]
            lines.append(f"{key}: {measured / names.claims[key].unit:.4g} ({'agrees' if agreed else 'differs'})")
        for name in names.claims[key].names:
            if name in derived.measured:
                lines.append(f"{names.metrics[name].label}: {_interval_text(derived.measured[name], bounds=True)}")
    for name, gain in derived.gains.items():
        baseline = claim.Baseline.Row or "the baseline"
        lines.append(f"{names.metrics[name].label} less {baseline}: {_difference_text(gain)}")
    for row, measured in derived.settings.items():
        lines += [f"{row}: {names.metrics[n].label} {_interval_text(v, bounds=True)}" for n, v in measured.items()]
    if derived.stale:
        lines.append(_stale_text(derived.stale))
    return LINE.join(lines) or "not run"


def claims_table(models: list[Model], derived: dict[str, Derived], title: str = "") -> Table:
    """Return the table of claimed rows; ``derived`` is keyed by row."""
    columns = ["row", "paper", "baseline in the paper", "measured, mean ± std [95 %]", "seeds", "status", "why"]
    rows = []
    for claim in (model.Claim for model in models):
        row, baseline = derived[claim.Row], _claimed_cell(claim.Baseline.Metrics)
        if claim.Baseline.name:
            baseline = f"{claim.Baseline.name}{LINE}{baseline}"
        cells = [claim.Row, _claimed_cell(claim.Metrics), baseline, _measured_cell(claim, row)]
        rows.append([*cells, str(row.n), row.status, row.reason])
    return Table(title, columns, rows)


def measured_tables(evidence: Evidence, derived: dict[str, Derived]) -> list[Table]:
    """Return the tables of what was measured, claimed rows and then ours, with one line on what was not run."""
    claimed = [model for model in evidence.ledger.Models if derived[model.Claim.Row].n]
    own = [
        evidence.records(scale, row.Row) for scale in ("full", "lite") for row in evidence.ledger.rows_of_scale(scale)
    ]
    tables = [claims_table(claimed, derived, "Claimed rows")] if claimed else []
    for scale in ("full", "lite"):
        tables += own_tables(evidence, scale, only_measured=True)
    missing = (
        f"{len(derived) - len(claimed)} of {len(derived)} claimed rows and {sum(not row.fresh for row in own)} of "
        f"{len(own)} rows of our own were not run: [RESULTS.md](RESULTS.md)."
    )
    tables = tables or [Table("", ["measured"], [["nothing yet"]])]
    tables[-1].notes.append(missing)
    return tables


def _headline(evidence: Evidence) -> str:
    """Return the comparison that the ledger names as its headline, with its interval; what is missing otherwise."""
    headline = evidence.ledger.Headline
    if headline is None:
        return NOTHING
    row, baseline = (next(r for r in evidence.ledger.Lite if r.Row == n) for n in (headline.Row, headline.Baseline))
    metric = headline.Metric or row.compared[0]
    test = paired(*(evidence.records("lite", name).values(metric) for name in (row.Row, baseline.Row)))
    pair, known = f"{row.Label} against {baseline.Label}", load_names().metrics[metric]
    if test.n < 2:
        return f"{pair}: not run"
    return f"{row.Group}: {pair}, {known.label}: {_difference_text(test, known)}, {test.n} seeds"


def summary_table(papers: list[tuple[Evidence, dict[str, Derived]]]) -> Table:
    """Return one row per paper: claimed, reproduced, measured at small scale, headline; ``derived`` by row."""
    at_scale = [f"measured at {scale} scale" for scale in ("full", "lite")]
    rows = []
    for evidence, derived in papers:
        name, lite = evidence.paper.name, [evidence.records("lite", row.Row) for row in evidence.ledger.Lite]
        reproduced = sum(row.status == "reproduced" for row in derived.values())
        measured = [
            str(sum(row.n > 0 for row in derived.values())),
            f"{sum(bool(r.fresh) for r in lite)} of {len(lite)} rows",
        ]
        link = f"[{name}]({name}/README.md)"
        rows.append([link, str(len(derived)), str(reproduced), *measured, _headline(evidence)])
    return Table("", ["paper", "claimed rows", "reproduced", *at_scale, "headline"], rows)
