"""The cells of every results table, so that a README and the terminal show the same."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table as RichTable

from shared.claims.ledger import Claim, Ledger, OwnRow, load_ledger
from shared.claims.status import Derived, Evidence, ExpectedHash, collect
from shared.metrics.names import load_names
from shared.metrics.seeds import Interval, Paired, holm, interval, paired

NOTHING = "–"
HOLDS = " †"
LINE = "<br>"  # a new line inside a cell of Markdown; the terminal breaks the line there


@dataclass(frozen=True)
class Table:
    """A table of texts with lines that stand below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def rich_table(table: Table) -> RichTable:
    """Return a table for the terminal, with the cells of the README; its notes are the caller's to print."""
    rich = RichTable(*table.columns, title=table.title or None, title_justify="left")
    for row in table.rows:
        rich.add_row(*[cell.replace(LINE, "\n").replace("[", "\\[") for cell in row])
    return rich


def commit_text(commit: str, dirty: bool = False) -> str:
    """Return a commit as tables print it: seven digits, and a mark for uncommitted changes."""
    return f"{commit[:7]}{' with uncommitted changes' if dirty else ''}"


def stale_text(commits) -> str:
    """Return the words for stale evidence."""
    return f"stale (commit {', '.join(sorted({commit_text(commit) for commit in commits}))})"


def interval_text(values: Interval, factor: float = 1.0, digits: int = 2, bounds: bool = False) -> str:
    """Return "mean ± std", with " [low, high]" if asked for; a single seed shows its value alone."""
    text = f"{values.mean * factor:.{digits}f}"
    if values.std is None:
        return text
    text += f" ± {values.std * factor:.{digits}f}"
    return text + (f" [{values.low * factor:.{digits}f}, {values.high * factor:.{digits}f}]" if bounds else "")


def _metric_cell(row: OwnRow, evidence: Evidence, metric: str) -> str:
    if metric not in (*row.Metrics, *row.Extra):
        return NOTHING
    present = [record.metrics.get(metric) for record in evidence.fresh.values()]
    texts = sorted({value for value in present if isinstance(value, str)})
    if texts:
        return "; ".join(texts)
    values = evidence.values(metric)
    if not values:
        return "undefined"
    known = load_names().metrics[metric]
    text = interval_text(interval(list(values.values())), known.factor, known.digits)
    return text if len(values) == len(present) else f"{text} (undefined for {len(present) - len(values)} seeds)"


Comparisons = dict[tuple[str, str, str], Paired]  # (row, baseline, metric) -> paired test


def _comparisons(rows: list[OwnRow], evidence: dict[str, Evidence]) -> Comparisons:
    """Return the paired tests of all rows against their baselines, those without a common seed left out."""
    tests = {}
    for row in rows:
        for baseline in row.Baseline:
            for metric in row.compared:
                first, second = (evidence[name].values(metric) for name in (row.Row, baseline))
                tests[row.Row, baseline, metric] = paired(first, second)
    return {key: test for key, test in tests.items() if test.n > 0}


def _difference_text(test: Paired, metric: str) -> str:
    """Return a paired difference in the metric's units, with its interval where there is one."""
    known = load_names().metrics[metric]
    text = f"{test.mean * known.factor:+.{known.digits}f}"
    if test.n < 2:
        return text
    return text + " [{}, {}]".format(*(f"{b * known.factor:.{known.digits}f}" for b in (test.low, test.high)))


def _difference_cell(row: OwnRow, metric: str, tests: Comparisons, holding: set, labels: dict[str, str]) -> str:
    """Return the differences with all baselines of a row, a line each; a mark where Holm's correction leaves one."""
    lines = []
    for baseline in row.Baseline:
        key = row.Row, baseline, metric
        if key not in tests:
            continue
        text = _difference_text(tests[key], metric)
        text += f"{HOLDS if key in holding else ''} vs {labels[baseline]}"
        if tests[key].n > 1 and tests[key].low <= 0 <= tests[key].high:
            text += ": no evidence"
        lines.append(text)
    return LINE.join(lines) or NOTHING


def _compared(rows: list[OwnRow]) -> list[list[str]]:
    """Return for every column of differences the metrics in it: the first of every row, the second, and so on."""
    columns = itertools.zip_longest(*(row.compared for row in rows))
    return [list(dict.fromkeys(metric for metric in column if metric)) for column in columns]


def _own_row(row: OwnRow, metrics: list[str], own: Evidence, differences: list[str]) -> list[str]:
    stale = stale_text(record.commit for record in own.stale.values()) if own.stale else ""
    if not own.fresh:
        cells = [stale or "not run", *[NOTHING] * (len(metrics) - 1)]
        return [row.Label, *cells, *[NOTHING] * len(differences), "0", NOTHING]
    cells = [_metric_cell(row, own, metric) for metric in metrics]
    n = f"{len(own.fresh)} and {len(own.stale)} {stale}" if stale else str(len(own.fresh))
    # The clock of a run that was resumed has seen its last part only.
    whole = [record.wall_seconds for record in own.fresh.values() if not record.metrics.get("resumed")]
    seconds = f"{interval(whole).mean:.0f}" if whole else NOTHING
    return [row.Label, *cells, *differences, n, seconds]


def _columns(rows: list[OwnRow], metrics: list[str]) -> list[str]:
    names = load_names().metrics
    compared = [" or ".join(dict.fromkeys(names[m].label for m in column)) for column in _compared(rows)]
    return [
        "",
        *[names[metric].label for metric in metrics],
        *[f"{label}: difference [95 %]" for label in compared],
        "seeds",
        "seconds",
    ]


def _where_from(evidence: list[Evidence]) -> list[str]:
    """Return the line that says on which machines and with which commits the evidence was made."""
    records = [record for row in evidence for record in row.fresh.values()]
    if not records:
        return []
    machines = Counter(
        ", ".join([str(r.hardware.get("cpu")), f"{r.hardware.get('cores')} cores", *r.hardware.get("gpus", [])])
        for r in records
    )
    commits = Counter(commit_text(record.commit, record.dirty) for record in records)
    parts = ["; ".join(f"{name} ({n} runs)" for name, n in sorted(seen.items())) for seen in (machines, commits)]
    return [f"Hardware: {parts[0]}. Commits: {parts[1]}."]


def _evidence(root, paper: str, scale: str, expected_hash: ExpectedHash, results=None) -> dict[str, Evidence]:
    """Return the records of the rows of our own at a scale, by row."""
    results, rows = results or Path(root) / paper / "results", load_ledger(root, paper).rows_of_scale(scale)
    return {row.Row: collect(results, paper, scale, row.Row, expected_hash, row.Formerly) for row in rows}


def lite_table(
    paper: str, root, scale: str, expected_hash: ExpectedHash, results=None, only_measured: bool = False
) -> list[Table]:
    """Return the measured tables of a paper, one per Group of its Lite (Demo, Full) list, in the list's order.

    A row shows mean ± standard deviation over its fresh seeds, the paired difference of every compared metric with
    its baselines, the number of seeds and the wall time. Notes that concern all groups stand in the last one.
    ``results`` is the folder of the records, `<paper>/results` if it is not given. ``only_measured`` leaves out
    rows without fresh evidence and extra columns; the corrections are for the comparisons of all rows all the same.
    """
    rows = load_ledger(root, paper).rows_of_scale(scale)
    evidence = _evidence(root, paper, scale, expected_hash, results)
    labels, tables = {row.Row: row.Label for row in rows}, []
    tests = _comparisons(rows, evidence)
    p_values = {pair: test.p_value for pair, test in tests.items() if test.n > 1}
    holding = holm(p_values)
    shown = [row for row in rows if evidence[row.Row].fresh or not only_measured]
    for group in dict.fromkeys(row.Group for row in shown):
        members = [row for row in shown if row.Group == group]
        extra = [] if only_measured else [metric for row in members for metric in row.Extra]
        metrics = list(dict.fromkeys([*(metric for row in members for metric in row.Metrics), *extra]))
        cells = []
        for row in members:
            differences = [_difference_cell(row, metric, tests, holding, labels) for metric in row.compared]
            differences += [NOTHING] * (len(_compared(members)) - len(differences))
            cells.append(_own_row(row, metrics, evidence[row.Row], differences))
        tables.append(Table(group, _columns(members, metrics), cells))
    if tables:
        tables[-1].notes.extend(_notes(rows, evidence, p_values, holding))
    return tables


def _notes(rows: list[OwnRow], evidence: dict[str, Evidence], p_values: dict, holding: set) -> list[str]:
    """Return what concerns all tables of a list: how to read them, the corrections, machines and commits."""
    if all(len(row.fresh) < 2 for row in evidence.values()) and any(row.fresh for row in evidence.values()):
        return ["One seed a row: no interval, and no claim is tested.", *_where_from(list(evidence.values()))]
    planned, made = sum(len(row.Baseline) * len(row.compared) for row in rows), len(p_values)
    comparisons = f"{made} paired comparisons"
    if made != planned:
        comparisons = f"{made} of {planned} paired comparisons, the others are not measured yet"
    notes = [
        "Mean ± standard deviation over seeds; differences are paired by seed, in the metric's units, and "
        '"no evidence" where their 95 % interval holds 0. '
        f"These tables hold {comparisons}; their 95 % intervals are not corrected for that number."
    ]
    if made:
        notes.append(
            f"{HOLDS.strip()} marks the {len(holding)} that stay different from 0 at 5 % when Holm's method "
            "corrects for that number."
        )
    return notes + _where_from(list(evidence.values()))


def _claimed_cell(metrics: dict) -> str:
    return LINE.join(f"{key}: {'not known' if v is None else getattr(v, 'text', v)}" for key, v in metrics.items())


def _measured_cell(claim: Claim, derived: Derived) -> str:
    names, lines = load_names(), []
    for key in claim.Metrics:
        if key in derived.counts:
            measured, agreed = derived.counts[key]
            lines.append(f"{key}: {measured / names.claims[key].unit:.4g} ({'agrees' if agreed else 'differs'})")
        for name in names.claims[key].names:
            if name in derived.measured:
                lines.append(f"{names.metrics[name].label}: {interval_text(derived.measured[name], bounds=True)}")
    for name, gain in derived.gains.items():
        bounds = f" [{gain.low:.2f}, {gain.high:.2f}]" if gain.n > 1 else ""
        lines.append(
            f"{names.metrics[name].label} less {claim.Baseline.Row or 'the baseline'}: {gain.mean:+.2f}{bounds}"
        )
    for row, measured in derived.settings.items():
        lines += [f"{row}: {names.metrics[n].label} {interval_text(v, bounds=True)}" for n, v in measured.items()]
    if derived.stale:
        lines.append(stale_text(derived.stale))
    return LINE.join(lines) or "not run"


def claims_table(ledger: Ledger, derived: dict[str, Derived], title: str = "") -> Table:
    """Return the table of a paper's claimed rows; ``derived`` is keyed by row."""
    columns = ["row", "paper", "baseline in the paper", "measured, mean ± std [95 %]", "seeds", "status", "why"]
    rows = []
    for claim in (model.Claim for model in ledger.Models):
        row, baseline = derived[claim.Row], _claimed_cell(claim.Baseline.Metrics)
        if claim.Baseline.name:
            baseline = f"{claim.Baseline.name}{LINE}{baseline}"
        cells = [claim.Row, _claimed_cell(claim.Metrics), baseline, _measured_cell(claim, row)]
        rows.append([*cells, str(row.n), row.status, row.reason])
    return Table(title, columns, rows)


def measured_table(paper: str, root, expected_hash: ExpectedHash, derived: dict[str, Derived]) -> list[Table]:
    """Return the tables of what was measured, claimed rows and then ours, with one line on what was not run."""
    ledger = load_ledger(root, paper)
    claimed = [model for model in ledger.Models if derived[model.Claim.Row].n]
    tables, missing = [], 0
    if claimed:
        tables.append(claims_table(ledger.model_copy(update={"Models": claimed}), derived, "Claimed rows"))
    for scale in ("full", "lite"):
        tables += lite_table(paper, root, scale, expected_hash, only_measured=True)
        evidence = _evidence(root, paper, scale, expected_hash)
        missing += sum(not row.fresh for row in evidence.values())
    missing = (
        f"{len(ledger.Models) - len(claimed)} of {len(ledger.Models)} claimed rows and {missing} of "
        f"{len(ledger.Full) + len(ledger.Lite)} rows of our own were not run: [RESULTS.md](RESULTS.md)."
    )
    if not tables:
        return [Table("", ["measured"], [["nothing yet"]], [missing])]
    tables[-1].notes.append(missing)
    return tables


def headline_text(paper: str, root, expected_hash: ExpectedHash) -> str:
    """Return the comparison that the ledger names as its headline, with its interval; what is missing otherwise."""
    ledger = load_ledger(root, paper)
    if ledger.Headline is None:
        return NOTHING
    rows = {row.Row: row for row in ledger.Lite}
    row, baseline = rows[ledger.Headline.Row], rows[ledger.Headline.Baseline]
    evidence, metric = (_evidence(root, paper, "lite", expected_hash), ledger.Headline.Metric or row.compared[0])
    test = paired(evidence[row.Row].values(metric), evidence[baseline.Row].values(metric))
    pair = f"{row.Label} against {baseline.Label}"
    if test.n < 2:
        return f"{pair}: not run"
    known = load_names().metrics[metric]
    return f"{row.Group}: {pair}, {known.label}: {_difference_text(test, metric)}, {test.n} seeds"


def summary_table(root, derived: dict[str, dict[str, Derived]], expected_hash: ExpectedHash) -> Table:
    """Return one row per paper: claimed, reproduced, measured at small scale, headline; ``derived`` by paper, row."""
    at_scale = [f"measured at {scale} scale" for scale in ("full", "lite")]
    columns = ["paper", "claimed rows", "reproduced", *at_scale, "headline"]
    rows = []
    for paper, claims in derived.items():
        lite = [bool(row.fresh) for row in _evidence(root, paper, "lite", expected_hash).values()]
        reproduced = sum(row.status == "reproduced" for row in claims.values())
        full = sum(row.n > 0 for row in claims.values())
        cells = [f"[{paper}]({paper}/README.md)", str(len(claims)), str(reproduced), str(full)]
        rows.append([*cells, f"{sum(lite)} of {len(lite)} rows", headline_text(paper, root, expected_hash)])
    return Table("", columns, rows)
