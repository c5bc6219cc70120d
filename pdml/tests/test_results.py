"""The differences that RESULTS.md states beside its tables are those of the records."""

import pytest

from shared.claims.compose import repository_root
from shared.metrics.seeds import paired
from shared.records import read_record

PAPER = repository_root() / "pdml"


def values(row: str, metric: str) -> dict[int, float]:
    records = map(read_record, (PAPER / "results/lite" / row).glob("seed*.json"))
    return {record.seed: record.metrics[metric] for record in records}


def text(row: str, metric: str, other: str, theirs: str, points: float) -> str:
    """Return the mean difference and its 95 % interval as the page prints them."""
    estimate = paired(values(row, metric), values(other, theirs))
    mean, low, high = (points * value for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def page() -> str:
    return " ".join((PAPER / "RESULTS.md").read_text(encoding="utf-8").split("## How it was measured")[0].split())


@pytest.mark.parametrize("split", ["random", "disjoint"])
@pytest.mark.parametrize("network", ["ssrn", "hybridsn", "ssftt"])
def test_what_fusion_adds_and_how_variance_follows_mixing_are_quoted_as_measured(split, network):
    row, plain = f"jasper-{split}-{network}-pdml", f"jasper-{split}-{network}-plain"
    assert text(row, "oa", row, "oa_centre", 100) in page()
    assert text(row, "rho", plain, "rho_entropy", 1) in page()


@pytest.mark.parametrize("row", ["random-ssftt", "random-hybridsn", "disjoint-hybridsn"])
def test_gains_at_the_centre_are_quoted_as_measured(row):
    assert text(f"jasper-{row}-pdml", "oa_centre", f"jasper-{row}-plain", "oa", 100) in page()


def test_no_other_metric_is_told_from_the_default():
    others = ("expected-squared-distance", "wasserstein", "bhattacharyya", "symmetric-kl")
    pairs = [(f"jasper-{split}-ssrn-pdml", other) for split in ("random", "disjoint") for other in others]
    quoted = {}
    for default, other in pairs:
        estimate = paired(values(f"{default}-{other}", "oa"), values(default, "oa"))
        assert estimate.low < 0 < estimate.high and estimate.mean > 0
        quoted[estimate.mean] = text(f"{default}-{other}", "oa", default, "oa", 100)
    assert quoted[min(quoted)] in page() and quoted[max(quoted)] in page()
