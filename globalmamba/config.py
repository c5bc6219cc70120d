"""GlobalMamba's configuration, made known to Hydra: ``schema.py`` and the tokens in front of a plain network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from globalmamba.schema import ClassificationConfig, ModelConfig
from shared.claims import rows

CONFIGS = str(Path(__file__).parent / "configs")


@dataclass
class TokensAndNetworkConfig(ModelConfig):
    tokens: dict[str, Any] | None = MISSING


@dataclass
class GlobalMambaConfig(ClassificationConfig):
    model: TokensAndNetworkConfig = MISSING


rows.register(Path(__file__).parent, GlobalMambaConfig)
