"""A paper's training that takes no time: pdml's configs and ledger with a fake train module behind them."""

import sys
from types import SimpleNamespace

import pytest

from shared.claims.compose import quoted

PLAIN, OWN = "synthetic-random-ssrn-plain", "synthetic-random-ssrn-pdml"


@pytest.fixture
def fake(monkeypatch):
    """The module that stands in for pdml.train; a test replaces ``run`` and ``seconds_of_run``."""
    module = SimpleNamespace(
        run=lambda cfg, folder: {"n_test": 10.0, "oa": 0.25 + cfg.seed / 100}, seconds_of_run=lambda cfg: 2.0
    )
    monkeypatch.setitem(sys.modules, "pdml.train", module)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    return module


@pytest.fixture
def there(tmp_path):
    """Overrides that keep records and runs inside the test's folder, named as main names them."""
    paths = {"paths.results": tmp_path / "pdml", "paths.runs": tmp_path / "pdml" / "runs"}
    return [f"{key}={quoted(str(path))}" for key, path in paths.items()]
