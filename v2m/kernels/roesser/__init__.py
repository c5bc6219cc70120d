"""The general state space model of the plane that V2M starts from, one opaque operator: ``roesser_scan``."""

from v2m.kernels.roesser.op import roesser_scan

__all__ = ["roesser_scan"]
