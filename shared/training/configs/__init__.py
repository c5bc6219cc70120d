"""Parts of a configuration that every paper has; Hydra finds them as ``pkg://shared.training.configs``."""
