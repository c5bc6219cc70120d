"""V2M: visual state space models with a two-dimensional scan (arXiv 2410.10382)."""
