"""The registry of named random streams: the first part of every key says what is drawn (``keyed.py``).

Two streams of one number share their bits where the rest of their keys agrees. Four pairs share one from before this
registry; they keep it, since another number would change every measured result, and none of them meets the other with
an equal rest:

- 21 and 22: the patches of PDML are keyed by (epoch, pixel), the fields and bumps of its synthetic scene by places;
- 31: a subset is keyed by (seed, image), a mixture in classification by (38, 31, seed, step), behind "mix";
- 32: a crop is keyed by (seed, epoch, image, view), dropped layers by (seed, step, rank), one part less.
"""

# Prefix, number of the first name, names, which are numbered on from it: a new one goes to the end of the last line of
# its prefix where the next number is free, else into a line of its own.
FAMILIES = (
    ("pdml.split", 1, "pixels blocks"),
    ("pdml.resample", 11, "halves draws noise"),
    ("pdml", 21, "augmentation pixel"),
    ("pdml.synthetic", 21, "fields bumps common scale shape noise"),
    ("classification", 31, "mixing dropping"),
    ("augment", 32, "crop flip rand_augment jitter erase noise mix"),
    ("sampler", 39, "balanced within"),
    ("idml", 41, "lambda mining held_out partner place mixed mixing"),
    ("opera", 51, "crop flip colour jitter order grey blur solarize labelled dropping"),
    ("opera.tuning", 61, "mixing dropping"),
    ("opera", 63, "hiding"),
)
STREAMS = {"subset": 31} | {
    f"{prefix}.{name}": number
    for prefix, first, names in FAMILIES
    for number, name in enumerate(names.split(), first)
}
SHARED_NUMBERS = {21, 22, 31, 32}  # the pairs above; no other number may come twice


def stream(name: str) -> int:
    """Return the number of a stream; KeyError for a name that is not registered."""
    return STREAMS[name]
