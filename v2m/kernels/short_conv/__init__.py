"""The short causal convolution and its SiLU on a grid, in four directions; see ``short_conv``."""

from v2m.kernels.short_conv.op import short_conv

__all__ = ["short_conv"]
