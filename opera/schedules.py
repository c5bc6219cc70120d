"""How learning rate and momentum move over a pre-training, as in MoCo-v3: smoothly, step by step."""

import math


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Return the part of the rate at a step: rising in a line for ``warmup`` steps, then half a cosine down to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def momentum(step: int, steps: int, base: float) -> float:
    """Return how much of itself the momentum encoder keeps at a step: from ``base`` to 1, half a cosine."""
    return 1 - 0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - base)
