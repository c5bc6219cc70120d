"""The group ``dense`` for every paper with rows of detection or segmentation; Hydra finds it as a package."""
