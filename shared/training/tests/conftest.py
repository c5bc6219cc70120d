"""The throw-away paper, importable, and its applications."""

from shared.training.tests.paper import config, fake, paper, start  # noqa: F401
