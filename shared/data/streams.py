"""The registry of named random streams: the first part of every key says what is drawn (``keyed.py``).

Two streams of one number share their bits where the rest of their keys agrees. A new stream takes the next free number.
Four pairs share one from before this registry; they keep it, since another number would change every measured result,
and none of them meets the other with an equal rest:

- 21 and 22: the patches of PDML are keyed by (epoch, pixel), the fields and bumps of its synthetic scene by places;
- 31: a subset is keyed by (seed, image), a mixture in classification by (38, 31, seed, step), behind "mix";
- 32: a crop is keyed by (seed, epoch, image, view), dropped layers by (seed, step, rank), one part less.
"""

STREAMS = {
    "pdml.split.pixels": 1,
    "pdml.split.blocks": 2,
    "pdml.resample.halves": 11,
    "pdml.resample.draws": 12,
    "pdml.resample.noise": 13,
    "pdml.augmentation": 21,
    "pdml.pixel": 22,
    "pdml.synthetic.fields": 21,
    "pdml.synthetic.bumps": 22,
    "pdml.synthetic.common": 23,
    "pdml.synthetic.scale": 24,
    "pdml.synthetic.shape": 25,
    "pdml.synthetic.noise": 26,
    "subset": 31,
    "classification.mixing": 31,
    "classification.dropping": 32,
    "augment.crop": 32,
    "augment.flip": 33,
    "augment.rand_augment": 34,
    "augment.jitter": 35,
    "augment.erase": 36,
    "augment.noise": 37,
    "augment.mix": 38,
    "sampler.balanced": 39,
    "sampler.within": 40,
    "idml.lambda": 41,
    "idml.mining": 42,
    "idml.held_out": 43,
    "idml.partner": 44,
    "idml.place": 45,
    "idml.mixed": 46,
    "idml.mixing": 47,
    "opera.crop": 51,
    "opera.flip": 52,
    "opera.colour": 53,
    "opera.jitter": 54,
    "opera.order": 55,
    "opera.grey": 56,
    "opera.blur": 57,
    "opera.solarize": 58,
    "opera.labelled": 59,
    "opera.dropping": 60,
    "opera.tuning.mixing": 61,
    "opera.tuning.dropping": 62,
    "opera.hiding": 63,
}
SHARED_NUMBERS = {21, 22, 31, 32}  # the pairs above; no other number may come twice


def stream(name: str) -> int:
    """Return the number of a stream; KeyError for a name that is not registered."""
    return STREAMS[name]
