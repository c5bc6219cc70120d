"""Contract tests run on embedded data alone."""

import pytest


@pytest.fixture(autouse=True)
def without_data_root(monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
