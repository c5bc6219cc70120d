"""OPERA: omni-supervised representation learning with hierarchical supervisions (arXiv 2210.05557)."""
