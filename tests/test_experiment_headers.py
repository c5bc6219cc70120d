"""Every experiment file opens with what its claim says: paper, table, row, expected values and the command.

The header is the comment behind the first line; a line that begins with "#   " goes on with the one before it.
"""

import re
from pathlib import Path

import pytest

from shared.claims.ledger import Claim, Model, load_ledger
from shared.claims.protocol import paper_names

ROOT = Path(__file__).resolve().parents[1]
PAPERS = paper_names(ROOT)


def header(text: str) -> list[str]:
    """Return the statements of a header, without the comment signs."""
    comment = re.match(r"# @package _global_\n((?:#.*\n)+)", text)[1]
    return [line.removeprefix("# ") for line in comment.replace("\n#   ", " ").splitlines()]


def metrics_text(metrics: dict) -> str:
    values = {key: "not known" if value is None else getattr(value, "text", value) for key, value in metrics.items()}
    return ", ".join(f"{key} {value}" for key, value in values.items())


def expected_values(claim: Claim) -> str:
    """Return the line of expected values; a baseline whose numbers are not known is left out."""
    line, baseline = f"Expected: {metrics_text(claim.Metrics)}", claim.Baseline
    if any(value is not None for value in baseline.Metrics.values()):
        row = f"(row {baseline.Row})" if baseline.Row else None
        name = " ".join(part for part in ("baseline", baseline.name, row) if part)
        line += f"; {name}: {metrics_text(baseline.Metrics)}"
    return f"{line}."


def differences(path: Path, text: str, models: list[Model]) -> list[str]:
    """Return the statements that the header of an experiment file lacks, by the claims that list the file."""
    paper, row = path.parts[-4], path.stem
    models = [model for model in models if f"{paper}/configs/experiment/{path.name}" in model.configs]
    if not models:
        return [f"{row} belongs to no claim"]
    own = next((model for model in models if row == model.Claim.Row), models[0])
    claim, statements = own.Claim, header(text)
    title = f"{own.in_collection} ({claim.Source.paper}), {claim.Source.table}: {claim.Source.row}"
    wanted = [expected_values(claim), f"make reproduce-{paper} SCALE=full ROWS={row} DATA_ROOT=..."]
    if row != claim.Row:
        wanted.append(f"A further setting of the claim {claim.Row}.")
    others = [model.Claim.Row for model in models if model is not own]
    if others:
        wanted.append(f"Also a setting of the claim{'s' * (len(others) > 1)} {', '.join(others)}.")
    missing = [statement for statement in wanted if statements.count(statement) != 1]
    return missing if statements[0].startswith(title) else [title, *missing]


def experiments(paper: str) -> list[Path]:
    return sorted((ROOT / paper / "configs" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("paper", PAPERS)
def test_every_header_says_what_its_claim_says(paper):
    models, files = load_ledger(ROOT, paper).Models, experiments(paper)
    assert len(files) >= len(models)
    wrong = {path.stem: differences(path, path.read_text(encoding="utf-8"), models) for path in files}
    assert {row: lines for row, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize("paper", PAPERS)
def test_every_changed_number_is_noticed(paper):
    models = load_ledger(ROOT, paper).Models
    for path in experiments(paper):
        text = path.read_text(encoding="utf-8")
        expected = re.search(r"# Expected: (?:.|\n#   )+", text)
        values = list(re.finditer(r"\d+|not known", expected[0]))
        assert values
        for value in values:
            begin, end = expected.start() + value.start(), expected.start() + value.end()
            changed = f"{text[:begin]}12345{text[end:]}"
            assert differences(path, changed, models), (path.stem, value)


@pytest.mark.parametrize("paper", PAPERS)
def test_another_paper_row_or_command_is_noticed(paper):
    models, path = load_ledger(ROOT, paper).Models, experiments(paper)[0]
    text = path.read_text(encoding="utf-8")
    for before, after in (
        (f"ROWS={path.stem}", f"ROWS={path.stem}-2"),
        ("(arXiv:", "(arXiv:1"),
        ("# make reproduce-", "# make show-"),
        ("# Expected:", "# Printed:"),
    ):
        assert before in text
        assert differences(path, text.replace(before, after, 1), models), (before, after)
