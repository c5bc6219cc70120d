"""The registry of named random streams, ``streams.yml``: the first part of every key says what is drawn (``keyed.py``).

Two streams of one number share their bits where the rest of their keys agrees. A new stream takes the next free number.
Four pairs share one from before this registry; they keep it, since another number would change every measured result,
and none of them meets the other with an equal rest:

- 21 and 22: the patches of PDML are keyed by (epoch, pixel), the fields and bumps of its synthetic scene by places;
- 31: a subset is keyed by (seed, image), a mixture in classification by (38, 31, seed, step), behind "mix";
- 32: a crop is keyed by (seed, epoch, image, view), dropped layers by (seed, step, rank), one part less.
"""

from pathlib import Path

import yaml

STREAMS: dict[str, int] = yaml.safe_load(Path(__file__).with_name("streams.yml").read_text(encoding="utf-8"))
SHARED_NUMBERS = {21, 22, 31, 32}  # the pairs above; no other number may come twice


def stream(name: str) -> int:
    """Return the number of a stream; KeyError for a name that is not registered."""
    return STREAMS[name]
