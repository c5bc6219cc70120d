"""Data sets, their manifests, and keyed randomness."""
