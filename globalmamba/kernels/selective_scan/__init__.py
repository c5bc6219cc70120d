"""The selective scan: one function, ``selective_scan``, on every device. README.md derives its backends."""

from globalmamba.kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan"]
