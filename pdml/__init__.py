"""PDML: probabilistic deep metric learning for hyperspectral image classification (arXiv 2211.08349)."""
