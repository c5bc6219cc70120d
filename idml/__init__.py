"""IDML: introspective deep metric learning (arXiv 2205.04449, 2309.09982)."""
