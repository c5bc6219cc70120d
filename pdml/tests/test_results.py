"""The differences that RESULTS.md states in its prose are those of its tables or, where none has them, the records."""

import re

import pytest

from shared.claims.compose import repository_root
from shared.metrics.seeds import paired
from shared.records import read_record

PAPER = repository_root() / "pdml"
DIFFERENCE = re.compile(r"([+-]?\d+\.\d+)(?: points)? \[(-?\d+\.\d+), (-?\d+\.\d+)\]")
NETWORKS, SPLITS = ("ssrn", "hybridsn", "ssftt"), ("random", "disjoint")
METRICS = ("expected-squared-distance", "wasserstein", "bhattacharyya", "symmetric-kl")


def values(row: str, metric: str) -> dict[int, float]:
    records = map(read_record, (PAPER / "results/lite" / row).glob("seed*.json"))
    return {record.seed: record.metrics[metric] for record in records}


def difference(row: str, metric: str, other: str, theirs: str, points: float) -> tuple[float, ...]:
    """Return the mean difference and its 95 % interval, rounded as the page prints them."""
    estimate = paired(values(row, metric), values(other, theirs))
    return tuple(round(points * value, 2) for value in (estimate.mean, estimate.low, estimate.high))


def metrics_against_the_default() -> list[tuple[float, ...]]:
    rows = [f"jasper-{split}-ssrn-pdml" for split in SPLITS]
    return [difference(f"{row}-{metric}", "oa", row, "oa", 100) for row in rows for metric in METRICS]


def beside_the_tables() -> set[tuple[float, ...]]:
    """Return what fusion adds, gains at the centre, how variance follows mixing, and the metrics."""
    found = set(metrics_against_the_default())
    for row in (f"jasper-{split}-{network}" for split in SPLITS for network in NETWORKS):
        pdml, plain = f"{row}-pdml", f"{row}-plain"
        found.add(difference(pdml, "oa", pdml, "oa_centre", 100))
        found.add(difference(pdml, "oa_centre", plain, "oa", 100))
        found.add(difference(pdml, "rho", plain, "rho_entropy", 1))
    return found


def quoted(text: str) -> set[tuple[float, ...]]:
    return {tuple(map(float, numbers)) for numbers in DIFFERENCE.findall(" ".join(text.split()))}


@pytest.fixture(scope="module")
def page() -> tuple[str, str]:
    """The prose on the numbers, and the rest with the tables."""
    prose, rest = (PAPER / "RESULTS.md").read_text(encoding="utf-8").split("## How it was measured")
    return prose, rest


def test_every_difference_of_the_prose_is_measured(page):
    prose, rest = page
    known = quoted(rest) | beside_the_tables()
    known |= {(-mean, -high, -low) for mean, low, high in known}  # "a is below b by"
    assert len(quoted(prose)) > 30 and quoted(prose) - known == set()


def test_every_interval_of_the_prose_has_its_mean(page):
    intervals = re.findall(r"\[-?\d+\.\d+, ?\s?-?\d+\.\d+\]", page[0])
    assert len(intervals) == len(DIFFERENCE.findall(" ".join(page[0].split())))


def test_no_other_metric_is_told_from_the_default_and_the_extremes_are_quoted(page):
    measured = sorted(metrics_against_the_default())
    assert all(low < 0 < high and mean > 0 for mean, low, high in measured)
    assert {measured[0], measured[-1]} <= quoted(page[0])
