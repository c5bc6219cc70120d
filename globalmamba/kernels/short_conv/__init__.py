"""The short causal convolution and its SiLU on a grid, in four directions; see ``short_conv``."""

from .op import short_conv

__all__ = ["short_conv"]
