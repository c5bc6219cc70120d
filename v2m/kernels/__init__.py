"""Kernels of V2M: the directional scan over a grid, the general recurrence, the short convolution."""
