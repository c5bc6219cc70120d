"""The claims ledger `<paper>/metafile.yml`: what a paper claims, in OpenMMLab's model-index format.

Schema (pydantic; an unknown key is an error), loading and the checks that need no evidence. Numbers keep the
text they were printed with, because parameters and FLOPs are compared in units of the last printed digit.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shared.errors import UserError
from shared.metrics.names import Names, load_names

COUNTED = ("parameters", "flops")  # compared by the counting rule, not by a tolerance
Status = Literal["not-run", "demo", "reproduced", "below", "above", "contradicted", "blocked"]


class Printed(float):
    """A float that remembers how it was printed."""

    text: str


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (7.0e6, without a sign, is a number), each with its text."""


def _printed(loader: _Loader, node: yaml.ScalarNode) -> float:
    number = Printed(loader.construct_yaml_float(node))
    number.text = node.value.replace("_", "")
    return number


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:float", _printed)


def agrees(claimed: float, measured: float, unit: float = 1.0) -> bool:
    """Say whether ``measured`` is within one unit of the last printed digit of ``claimed`` x ``unit``.

    7.0e6 agrees with 6.9e6 to 7.1e6, 26e6 with 25e6 to 27e6.
    """
    printed = Decimal(getattr(claimed, "text", str(claimed)))
    digit = Decimal(1).scaleb(printed.as_tuple().exponent)
    scale = Decimal(str(float(unit)))
    return abs(Decimal(str(measured)) - printed * scale) <= digit * scale


def _metric(value: Any) -> Any:
    if not isinstance(value, bool) and isinstance(value, str | int | float | None):
        return value
    raise ValueError("a metric is a number, a text or null")


Metrics = dict[str, Annotated[Any, AfterValidator(_metric)]]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Collection(_Block):
    """One method: OpenMMLab's collection."""

    Name: str
    Metadata: dict[str, Any] = {}
    Paper: dict[str, Any] = {}
    README: str | None = None
    Code: dict[str, Any] = {}


class Metadata(_Block):
    """What is known of a model besides its results."""

    parameters: int | None = Field(None, alias="Parameters")
    flops: int | None = Field(None, alias="FLOPs")
    epochs: int | None = Field(None, alias="Epochs")
    batch_size: int | None = Field(None, alias="Batch Size")
    gpu_hours: float | None = Field(None, alias="GPU Hours")
    training_data: str | None = Field(None, alias="Training Data")
    architecture: list[str] | None = Field(None, alias="Architecture")


class Source(_Block):
    """Where the paper prints the number, and how the number reached us."""

    paper: str
    table: str
    row: str
    tier: Literal["primary", "primary-transcribed", "secondary", "missing"]


class Baseline(_Block):
    """The row that the paper compares with, with its numbers; ``Row`` is ours that measures it, claimed or Full."""

    name: str | None
    Row: str | None = None
    Metrics: Metrics


class EvidenceFile(_Block):
    """A run record that a status rests on; written by `make claims`."""

    File: str
    SHA256: str


class Result(_Block):
    """A measured result in the units of the paper; written by `make claims`."""

    Task: str
    Dataset: str
    Metrics: dict[str, float]
    Seeds: list[int]


class Claim(_Block):
    """What the paper says of one row, how it is to be measured, and what came of it."""

    Row: str
    Source: Source
    Metrics: Metrics
    Baseline: Baseline
    Selection: Literal["last-epoch", "best-test-epoch", "held-out"]
    Variant: Literal["as_written", "as_released"]
    Seeds: list[int]
    Tolerance: dict[str, float]
    Status: Status
    Why: str | None
    Evidence: list[EvidenceFile]


class Model(_Block):
    """One claimed row."""

    Name: str
    in_collection: str = Field(alias="In Collection")
    Config: str | list[str]
    Metadata: Metadata
    Results: list[Result]
    Claim: Claim

    @property
    def configs(self) -> list[str]:
        return [self.Config] if isinstance(self.Config, str) else self.Config

    @property
    def config(self) -> str:
        """The config whose stem is the row's name."""
        return next(config for config in self.configs if Path(config).stem == self.Claim.Row)


def _as_list(value: Any) -> Any:
    """Let a list of one be written without brackets and an empty one as null."""
    return [] if value is None else [value] if isinstance(value, str) else value


class OwnRow(_Block):
    """A row of our own, without a status against the paper; ``Baseline`` names the rows it is compared with.

    ``Compose``: its configuration, as groups and values (``rows.experiment_node``). ``Compared``: the metrics that are
    compared; the first one where none is named. ``Formerly``: the name under which some of its records were written.
    """

    Row: str
    Group: str
    Label: str
    Compose: dict[str, Any]
    Baseline: Annotated[list[str], BeforeValidator(_as_list)] = []
    Metrics: list[str] = Field(min_length=1)
    Extra: list[str] = []
    Compared: list[str] = []
    Formerly: str | None = None

    @property
    def compared(self) -> list[str]:
        return self.Compared or self.Metrics[:1]


GROUP_KEYS = {"Group", "Compose", "Metrics", "Extra", "Compared", "Rows"}


def _rows_of_groups(groups: Any) -> Any:
    """Return the rows of a list of groups, each with what its group gives to all; a row's own keys come first.

    A group has a title (``Group``), ``Rows``, and any of Compose, Metrics, Extra and Compared.
    """
    rows = []
    for group in groups or []:
        if not isinstance(group, dict) or "Rows" not in group or group.keys() - GROUP_KEYS:
            raise ValueError(f"a group has Rows and at most the keys {', '.join(sorted(GROUP_KEYS))}")
        common = {key: value for key, value in group.items() if key != "Rows"}
        for row in group["Rows"]:
            rows.append(common | row | {"Compose": group.get("Compose", {}) | row.get("Compose", {})})
    return rows


Rows = Annotated[list[OwnRow], BeforeValidator(_rows_of_groups)]


class HeadlineRows(_Block):
    """The comparison of two Lite rows that the summary of all papers shows, in the row's first compared metric."""

    Row: str
    Baseline: str
    Metric: str | None = None


class Ledger(_Block):
    """One paper's metafile.yml."""

    Headline: HeadlineRows | None = None
    Collections: list[Collection]
    Models: list[Model]
    Lite: Rows = []
    Demo: Rows = []
    Full: Rows = []  # beside the claims: baselines and scenes that the paper does not report

    @property
    def own_rows(self) -> list[OwnRow]:
        return [*self.Lite, *self.Demo, *self.Full]

    def rows_of_scale(self, scale: str) -> list[OwnRow]:
        return {"lite": self.Lite, "demo": self.Demo, "full": self.Full}[scale]


def _load(path: Path, schema: type[BaseModel]):
    try:
        return schema.model_validate(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}): fix it.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; fix this key.") from error


def read_ledger(path: Path) -> Ledger:
    """Read a metafile; UserError that names the file and the key where it does not have the ledger's form."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: every paper has its ledger there.")
    return _read_version(path, path.stat().st_mtime_ns)


@functools.lru_cache(16)
def _read_version(path: Path, modified: int) -> Ledger:
    return _load(path, Ledger)


def load_ledger(root, paper: str) -> Ledger:
    """Read and validate a ledger; UserError that names the file, the row and the remedy."""
    path = Path(root) / paper / "metafile.yml"
    ledger = read_ledger(path)
    claims = (_claim_faults(model.Claim, load_names()) for model in ledger.Models)
    own = (_own_row_faults(rows) for rows in (ledger.Lite, ledger.Demo, ledger.Full))
    for fault in itertools.chain(_name_faults(Path(root), ledger), *claims, *own):
        raise UserError(f"{path}: {fault}")
    return ledger


def _name_faults(root: Path, ledger: Ledger) -> Iterator[str]:
    """Yield, in a sentence each, what is wrong with the names of rows, files, baselines and collections."""
    rows = [model.Claim.Row for model in ledger.Models] + [row.Row for row in ledger.own_rows]
    yield from (f"row {row} stands there twice: keep one." for row in rows if rows.count(row) > 1)
    collections = [collection.Name for collection in ledger.Collections]
    for model in ledger.Models:
        row, baseline = model.Claim.Row, model.Claim.Baseline.Row
        if row not in [Path(config).stem for config in model.configs]:
            yield f"row {row} has no config {row}.yaml: a row and its experiment share a name."
        for config in model.configs:
            if not (root / config).is_file():
                yield f"{config} of row {row} does not exist: write it or fix the path."
        others = {other.Claim.Row for other in ledger.Models} | {own.Row for own in ledger.Full}
        if baseline not in {None, *others} - {row}:
            yield f"baseline row {baseline!r} of {row} is no other row of the ledger's Models or Full."
        if model.in_collection not in collections:
            yield f"{model.Name} is in {model.in_collection!r}, no collection of it."
    headline = ledger.Headline
    if headline and not {headline.Row, headline.Baseline} <= {row.Row for row in ledger.Lite}:
        yield "Headline names a row that is none of Lite: fix it."


def _own_row_faults(rows: list[OwnRow]) -> Iterator[str]:
    known, metrics = {row.Row for row in rows}, load_names().metrics
    for row in rows:
        for baseline in row.Baseline:
            if baseline not in known - {row.Row}:
                yield f"baseline {baseline!r} of {row.Row} is no other row of its list."
        for metric in row.Compared:
            if metric not in row.Metrics:
                yield f"{row.Row} compares {metric!r}, which is none of its Metrics."
        for metric in (*row.Metrics, *row.Extra):
            if metric not in metrics:
                yield f"{row.Row} shows {metric!r}, which shared/metrics/names.yml lacks."


def _claim_faults(claim: Claim, names: Names) -> Iterator[str]:
    for key, value in (*claim.Metrics.items(), *claim.Baseline.Metrics.items()):
        if key not in names.claims:
            yield f"metric {key!r} of {claim.Row} is not in shared/metrics/names.yml: add it."
        if isinstance(value, int | float) and len(names.claims[key].names) > 1:
            yield f"metric {key!r} of {claim.Row} is several numbers: give each its own key."
    for key, value in claim.Metrics.items():
        is_score = isinstance(value, int | float) and names.claims[key].names[0] not in COUNTED
        if is_score and key not in claim.Tolerance:
            yield f"{claim.Row} gives no Tolerance for {key!r}: say how near is near enough."
    for key in claim.Tolerance.keys() - claim.Metrics.keys():
        yield f"{claim.Row} has a Tolerance for {key!r}, which it does not claim."
    if len(set(claim.Seeds)) != len(claim.Seeds) or not claim.Seeds:
        yield f"the Seeds of {claim.Row} must be different numbers, at least one."
    if claim.Status == "blocked" and not claim.Why:
        yield f"{claim.Row} is blocked without a Why: say what blocks it."
