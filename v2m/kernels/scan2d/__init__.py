"""The selective scan of a grid, row by row or column by column: one function, ``scan2d``, on every device."""

from v2m.kernels.scan2d.op import scan2d

__all__ = ["scan2d"]
