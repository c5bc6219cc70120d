"""V2M's configuration, made known to Hydra; its types stand in ``schema.py``."""

from pathlib import Path

from shared.claims import rows
from v2m.schema import ClassificationConfig

CONFIGS = str(Path(__file__).parent / "configs")

rows.register(Path(__file__).parent, ClassificationConfig)
