"""The small repository of the ledger's tests."""

from shared.claims.tests.conftest import config, evidence, fake, paper, repository, start  # noqa: F401
