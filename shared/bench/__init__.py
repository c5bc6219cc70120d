"""Timing calls on this machine, figures of a GPU, and the peers that kernels are timed beside."""
