"""The claims ledger `<paper>/metafile.yml`: what a paper claims, in OpenMMLab's model-index format.

Its schema (pydantic; an unknown key is an error), the checks that need no evidence, and loading. Numbers keep the text
that they were printed with, because parameters and FLOPs are compared in units of the last printed digit.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from shared.errors import UserError
from shared.metrics.names import ClaimKey, load_names

COUNTED = ("parameters", "flops")  # compared by the counting rule, not by a tolerance
GROUP_KEYS = {"Group", "Compose", "Metrics", "Extra", "Compared", "Readme", "Default", "Rows"}
FLOAT = "tag:yaml.org,2002:float"


class Printed(float):
    """A float that is shown as it was printed, with its ``text``."""

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (7.0e6, without a sign, is a number), each with its text."""

    def construct_printed(self, node: yaml.ScalarNode) -> Printed:
        number = Printed(self.construct_yaml_float(node))
        number.text = node.value.replace("_", "")
        return number


_Loader.add_implicit_resolver(FLOAT, re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_constructor(FLOAT, _Loader.construct_printed)


def agrees(claimed: float, measured: float, unit: float = 1.0) -> bool:
    """Say whether ``measured`` is within one unit of the last printed digit of ``claimed`` x ``unit``.

    7.0e6 agrees with 6.9e6 to 7.1e6, 26e6 with 25e6 to 27e6.
    """
    printed, scale = Decimal(str(claimed)), Decimal(str(float(unit)))
    digit = Decimal(1).scaleb(printed.as_tuple().exponent)
    return abs(Decimal(str(measured)) - printed * scale) <= digit * scale


def _metric(value: Any) -> Any:
    if not isinstance(value, bool) and isinstance(value, str | int | float | None):
        return value
    raise ValueError("a metric is a number, a text or null")


def _as_list(value: Any) -> Any:
    """Let a list of one be written without brackets and an empty one as null."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _rows_of_groups(groups: Any) -> Any:
    """Return the rows of a list of groups, each with what its group gives to all; a row's own keys come first.

    A group has a title (``Group``), ``Rows``, and any of the keys of ``OwnRow`` that are a group's.
    """
    rows = []
    for group in groups or []:
        if not isinstance(group, dict) or "Rows" not in group or group.keys() - GROUP_KEYS:
            raise ValueError(f"a group has Rows and at most the keys {', '.join(sorted(GROUP_KEYS))}")
        common = {key: value for key, value in group.items() if key != "Rows"}
        rows += [common | r | {"Compose": group.get("Compose", {}) | r.get("Compose", {})} for r in group["Rows"]]
    return rows


Metrics = dict[str, Annotated[Any, AfterValidator(_metric)]]  # a union of types would lose how a number was printed
Texts = Annotated[list[str], BeforeValidator(_as_list)]
# OpenMMLab's blocks, of which little is read. Results and Evidence are written by `make claims`: a measured result in
# the paper's units, and a run record that a status rests on.
Collection = dict[Literal["Name", "README", "Metadata", "Paper", "Code"], Any]
About = Literal["Training Data", "Parameters", "FLOPs", "Epochs", "Batch Size", "GPU Hours", "Architecture"]
Metadata = dict[About, str | int | float | list[str] | None]
Result = dict[Literal["Task", "Dataset", "Metrics", "Seeds"], Any]
EvidenceFile = dict[Literal["File", "SHA256"], str]


class Source(BaseModel, extra="forbid"):
    """Where the paper prints the number, and how the number reached us."""

    paper: str
    table: str
    row: str
    tier: Literal["primary", "primary-transcribed", "secondary", "missing"]


class Baseline(BaseModel, extra="forbid"):
    """The row that the paper compares with, with its numbers; ``Row`` is ours that measures it, claimed or Full."""

    name: str | None
    Row: str | None = None
    Metrics: Metrics


class Claim(BaseModel, extra="forbid"):
    """What the paper says of one row, how it is to be measured, and what came of it."""

    Row: str
    Source: Source
    Metrics: Metrics
    Baseline: Baseline
    Selection: Literal["last-epoch", "best-test-epoch", "best-ema-epoch", "held-out"]
    Variant: Literal["as_written", "as_released"]
    Seeds: list[int]
    Tolerance: dict[str, float]
    Status: Literal["not-run", "demo", "reproduced", "below", "above", "contradicted", "blocked"]
    Why: str | None
    Evidence: list[EvidenceFile]

    def numbers(self, counted: bool) -> dict[str, ClaimKey]:
        """Return the keys with a number: parameters and FLOPs where ``counted``, the scores otherwise."""
        known = {k: load_names().claims[k] for k, value in self.Metrics.items() if isinstance(value, int | float)}
        return {key: meant for key, meant in known.items() if (meant.names[0] in COUNTED) == counted}


class Model(BaseModel, extra="forbid"):
    """One claimed row; its first or only config is of the row's name, further ones are settings of the claim."""

    Name: str
    in_collection: str = Field(alias="In Collection")
    configs: Texts = Field(alias="Config")
    Metadata: Metadata
    Results: list[Result]
    Claim: Claim

    @property
    def rows(self) -> list[str]:
        return [Path(config).stem for config in self.configs]


class OwnRow(BaseModel, extra="forbid"):
    """A row of our own, without a status against the paper; ``Baseline`` names the rows it is compared with.

    ``Compose``: its configuration, as groups and values (``rows.experiment_node``). ``Compared``: the metrics that are
    compared; the first one where none is named. ``Formerly``: a name that some records say. ``Readme``: shown there.
    ``Default``: run where no rows are named.
    """

    Row: str
    Group: str
    Label: str
    Compose: dict[str, Any]
    Baseline: Texts = []
    Metrics: list[str] = Field(min_length=1)
    Extra: list[str] = []
    Compared: list[str] = []
    Readme: bool = True
    Default: bool = True
    Formerly: str | None = None

    @property
    def compared(self) -> list[str]:
        return self.Compared or self.Metrics[:1]


OwnRows = Annotated[list[OwnRow], BeforeValidator(_rows_of_groups)]


class Ledger(BaseModel, extra="forbid"):
    """One paper's metafile.yml.

    ``Headline``: the two Lite rows whose comparison the summary of all papers shows, in ``Metric`` or the first one's
    first compared metric. ``Full`` stands beside the claims: baselines and scenes that the paper does not report.
    """

    Headline: dict[Literal["Row", "Baseline", "Metric"], str] | None = None
    Collections: list[Collection]
    Models: list[Model]
    Lite: OwnRows = []
    Demo: OwnRows = []
    Full: OwnRows = []

    @property
    def planned(self) -> int:
        """The number of claimed scores that have a baseline's beside them: the comparisons that are planned."""
        scores = [(model.Claim.Baseline.Metrics, key) for model in self.Models for key in model.Claim.numbers(False)]
        return sum(isinstance(theirs.get(key), int | float) for theirs, key in scores)

    @property
    def own_rows(self) -> list[OwnRow]:
        return [*self.Lite, *self.Demo, *self.Full]

    def rows_of_scale(self, scale: str) -> list[OwnRow]:
        return {"lite": self.Lite, "demo": self.Demo, "full": self.Full}[scale]


def _rules_of_names(root: Path, ledger: Ledger) -> Iterator[tuple[object, str]]:
    """Yield what is to hold of the names of rows, files, baselines and collections, and the sentence where it fails."""
    claims = [model.Claim for model in ledger.Models]
    for row, times in Counter(row.Row for row in (*claims, *ledger.own_rows)).items():
        yield times == 1, f"row {row} is listed twice: keep one."
    for model, claim in zip(ledger.Models, claims, strict=True):
        row, other, collection = claim.Row, claim.Baseline.Row, model.in_collection
        yield row in model.rows, f"row {row} has no config {row}.yaml: a row and its experiment share a name."
        for config in model.configs:
            yield (root / config).is_file(), f"{config} of row {row} does not exist: write it or fix the path."
        is_known = other in {None, *(known.Row for known in (*claims, *ledger.Full))} - {row}
        yield is_known, f"baseline row {other!r} of {row} is not another row of the ledger's Models or Full."
        is_known = collection in [known.get("Name") for known in ledger.Collections]
        yield is_known, f"{model.Name} is in {collection!r}, no collection of it."
    headline, lite = ledger.Headline or {}, {row.Row for row in ledger.Lite}
    is_known = ledger.Headline is None or {headline.get("Row"), headline.get("Baseline")} <= lite
    yield is_known, "Headline names a row that is not in Lite: fix it."
    metric = headline.get("Metric")
    yield metric in (None, *load_names().metrics), f"Headline compares {metric!r}, not in shared/metrics/names.yml."


def _rules_of_metrics(ledger: Ledger) -> Iterator[tuple[object, str]]:
    """Yield what is to hold of claims and of rows of our own, and the sentence where it fails."""
    names = load_names()
    for claim in (model.Claim for model in ledger.Models):
        for key, value in (*claim.Metrics.items(), *claim.Baseline.Metrics.items()):
            yield key in names.claims, f"metric {key!r} of {claim.Row} is not in shared/metrics/names.yml: add it."
            is_one = len(names.claims[key].names) == 1 or not isinstance(value, int | float)
            yield is_one, f"metric {key!r} of {claim.Row} is several numbers: give each its own key."
        for key in claim.numbers(counted=False):
            yield key in claim.Tolerance, f"{claim.Row} gives no Tolerance for {key!r}: say how near is near enough."
        for key in claim.Tolerance:
            yield key in claim.Metrics, f"{claim.Row} has a Tolerance for {key!r}, which it does not claim."
        differ = len(set(claim.Seeds)) == len(claim.Seeds) > 0
        yield differ, f"the Seeds of {claim.Row} must be different numbers, at least one."
        yield claim.Status != "blocked" or claim.Why, f"{claim.Row} is blocked without a Why: say what blocks it."
    for rows in (ledger.Lite, ledger.Demo, ledger.Full):
        for row in rows:
            for other in row.Baseline:
                is_known = other in {known.Row for known in rows} - {row.Row}
                yield is_known, f"baseline {other!r} of {row.Row} is not another row of its list."
            for metric in row.Compared:
                yield metric in row.Metrics, f"{row.Row} compares {metric!r}, which is none of its Metrics."
            for metric in (*row.Metrics, *row.Extra):
                is_known = metric in names.metrics
                yield is_known, f"{row.Row} shows {metric!r}, which shared/metrics/names.yml lacks."


def load_ledger(root, paper: str) -> Ledger:
    """Read and validate a ledger; UserError that names the file, the row or the key, and the remedy."""
    path = Path(root) / paper / "metafile.yml"
    if not path.is_file():
        raise UserError(f"{path} does not exist: every paper has its ledger there.")
    return _load_version(path, path.stat().st_mtime_ns)


@functools.lru_cache(16)
def _load_version(path: Path, modified: int) -> Ledger:
    try:
        ledger = Ledger.model_validate(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}): fix it.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; fix this key.") from error
    for is_kept, sentence in itertools.chain(_rules_of_names(path.parents[1], ledger), _rules_of_metrics(ledger)):
        if not is_kept:
            raise UserError(f"{path}: {sentence}")
    return ledger
