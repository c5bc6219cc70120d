"""Timing calls on this machine, and what a GPU is measured with."""
