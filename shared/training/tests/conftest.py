"""The throw-away paper, importable, with the repository and the paper on the path of further processes."""

import importlib
import os

import pytest

from shared.environment import repository_root
from shared.training.tests.paper import forget_paper, write_paper


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """The folder of the paper; its modules are those of this test."""
    folder = write_paper(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(repository_root())]))
    monkeypatch.chdir(tmp_path)
    for variable in ("DATA_ROOT", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)
    forget_paper()
    importlib.import_module("fake.config")
    yield folder
    forget_paper()


@pytest.fixture
def fake(paper):
    """The module ``fake.train``; a test replaces ``run`` and ``seconds_of_run``."""
    return importlib.import_module("fake.train")


@pytest.fixture
def config(paper):
    """Compose a row of the paper: (row, seed, overrides) -> configuration."""
    from shared.claims.compose import row_config  # the ledger is above this layer, and so are rows
    from shared.claims.protocol import Paper

    return lambda row="plain", seed=0, overrides=(): row_config(
        Paper("fake", paper.parent), row, seed, overrides
    )
