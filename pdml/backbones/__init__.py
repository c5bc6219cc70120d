"""Backbones from the literature in a dense form: one feature per pixel of the patch."""
