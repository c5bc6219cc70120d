"""Mamba's short convolution with its SiLU, in one direction or both: one function, ``short_conv``."""

from globalmamba.kernels.short_conv.op import short_conv

__all__ = ["short_conv"]
