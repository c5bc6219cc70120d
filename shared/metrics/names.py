"""The table of metric names, ``names.yml``: how tables print ours, and which of them a paper's key means."""

import functools
from pathlib import Path

import yaml
from pydantic import BaseModel, Field


class MetricName(BaseModel, extra="forbid"):
    """How tables print a metric of ours: value x factor, with that many digits."""

    label: str
    factor: float = 1.0
    digits: int = 2

    def text(self, value: float) -> str:
        return f"{value * self.factor:.{self.digits}f}"


class ClaimKey(BaseModel, extra="forbid"):
    """Which of our metrics a paper's key means: claimed number x unit = ours."""

    names: list[str] = Field(min_length=1)
    unit: float


class Names(BaseModel, extra="forbid"):
    """names.yml."""

    metrics: dict[str, MetricName]
    claims: dict[str, ClaimKey]

    def headline(self, metrics: dict) -> str | None:
        """Return the first metric of the table that a run has as a number, None without one."""
        return next((name for name in self.metrics if isinstance(metrics.get(name), float)), None)

    def cells(self, name: str, value) -> tuple[str, str]:
        """Return label and value of a run's metric as tables print them; of a list one value behind the other."""
        known = self.metrics.get(name)
        if known and isinstance(value, float):
            return known.label, known.text(value)
        if isinstance(value, list):
            return f"{name} %", ", ".join("–" if v is None else f"{v * 100:.2f}" for v in value)
        return name, f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def load_names() -> Names:
    """Return the table of metric names; pydantic's error if it is malformed."""
    text = Path(__file__).with_name("names.yml").read_text(encoding="utf-8")
    return Names.model_validate(yaml.safe_load(text))
