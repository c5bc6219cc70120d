"""A small repository on disk, with one paper, its ledger, its READMEs and run records to order."""

import json
from pathlib import Path

import pytest

from shared.claims.evidence import Evidence
from shared.claims.pages import update
from shared.claims.protocol import Paper
from shared.claims.status import Derived
from shared.records import RunRecord, write_record
from shared.training.tests.paper import config, fake, paper, start  # noqa: F401

LEDGER = """\
Collections:
  - Name: Fake
Models:
  # a comment that stays
  - Name: fake-small
    In Collection: Fake
    Config: fake/configs/experiment/fake-a.yaml
    Metadata: {Training Data: Digits}
    Results: []
    Claim:
      Row: fake-a
      Source: {paper: none, table: T1, row: ours, tier: primary}
      Metrics: {top1: 76.20}  # printed so
      Baseline: {name: theirs, Metrics: {top1: 75.8}}
      Selection: last-epoch
      Variant: as_written
      Seeds: [0, 1, 2, 3]
      Tolerance: {top1: 0.3}
      Status: not-run
      Why: needs a week
      Evidence: []
  - Name: fake-base
    In Collection: Fake
    Config: fake/configs/experiment/fake-b.yaml
    Metadata: {}
    Results: []
    Claim:
      Row: fake-b
      Source: {paper: none, table: T1, row: theirs, tier: primary}
      Metrics: {top1: 75.8}
      Baseline: {name: null, Metrics: {}}
      Selection: last-epoch
      Variant: as_written
      Seeds: [0, 1, 2]
      Tolerance: {top1: 0.3}
      Status: not-run
      Why:
      Evidence: []
Lite:
  - Group: Digits
    Metrics: [oa]
    Rows:
      - {Row: lite-plain, Label: plain, Metrics: [oa, aa]}
      - {Row: lite-new, Label: new, Baseline: lite-plain, Extra: [rho, classes_scored]}
"""


def markers(*names: str) -> str:
    return "".join(f"<!-- claims:begin {name} -->\n<!-- claims:end {name} -->\n" for name in names)


def present_hash(name: str, row: str, seed: int) -> str:
    """Stand in for the hash of the composed config."""
    return f"hash of {name} {row} {seed}"


def refuses(of: Paper, cfg):
    raise AssertionError("nothing is counted where no claim has a count")


class Repository:
    """The tree, with shorthands for what the tests do to it."""

    def __init__(self, root: Path):
        self.root = root
        self.ledger, self.readme = root / "fake/metafile.yml", root / "fake/README.md"
        self.results = root / "fake/RESULTS.md"
        experiments = root / "fake/configs/experiment"
        experiments.mkdir(parents=True)
        for row in ("fake-a", "fake-b"):
            (experiments / f"{row}.yaml").write_text("{}\n")
        self.ledger.write_text(LEDGER)
        self.readme.write_text(f"# Fake\n\n{markers('measured')}\ntext that stays\n")
        self.results.write_text(f"# Results\n\n{markers('claims', 'lite')}\ntext that stays\n")
        (root / "README.md").write_text(f"# All\n{markers('summary')}")

    def edit(self, old: str, new: str, file: Path | None = None) -> None:
        file = file or self.ledger
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    def mark(self, file: Path, name: str) -> None:
        """Add a place for a table."""
        file.write_text((file.read_text() if file.exists() else "") + markers(name))

    def run(self, row: str, values, metric: str = "top1", scale: str = "full", first: int = 0, **changes) -> None:
        """Write one record per value, from seed ``first`` on."""
        for seed, value in enumerate(values, start=first):
            metrics = value if isinstance(value, dict) else {metric: value}
            record = make_record(row=row, seed=seed, scale=scale, metrics=metrics, **changes)
            write_record(self.root / f"fake/results/{scale}/{row}/seed{seed}.json", record, overwrite=True)

    def texts(self) -> dict[Path, str]:
        return {path: path.read_text() for path in self.root.rglob("*") if path.is_file()}


def make_record(**changes) -> RunRecord:
    values = {
        "paper": "fake",
        "row": "fake-a",
        "scale": "full",
        "seed": 0,
        "selection": "last-epoch",
        "variant": "as_written",
        "metrics": {"top1": 0.762},
        "n_test": 100,
        "config": {"model": {"width": 3}},
        "commit": "0123456789abcdef",
        "dirty": False,
        "lock_sha256": "a" * 64,
        "manifest_sha256": "b" * 64,
        "hardware": {"cpu": "a processor", "cores": 2, "memory_bytes": 1, "gpus": []},
        "driver": None,
        "versions": {"python": "3.11"},
        "wall_seconds": 30.0,
        "peak_memory_bytes": 1,
        "started_at": "2024-01-01T00:00:00+00:00",
        **changes,
    }
    values.setdefault("config_sha256", present_hash(values["paper"], values["row"], values["seed"]))
    return RunRecord.model_validate(json.loads(json.dumps(values)))


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    """A repository whose rows have no configurations: their hashes and counts are stood in for."""
    monkeypatch.setattr(Paper, "count", refuses)
    monkeypatch.setattr("shared.claims.status.row_config", lambda of, row, seed: None)
    monkeypatch.setattr(Evidence, "expected_hash", lambda of, row, seed, *_: present_hash(of.paper.name, row, seed))
    return Repository(tmp_path)


@pytest.fixture
def evidence(repository):
    """Read the evidence for the paper as it is now."""
    return lambda: Evidence(Paper("fake", repository.root))


@pytest.fixture
def update_(repository):
    return lambda **how: update(repository.root, **how)


@pytest.fixture
def status(evidence):
    def derived(index: int = 0):
        now = evidence()
        return Derived(now, now.ledger.Models[index])

    return derived
