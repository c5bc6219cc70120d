"""GlobalMamba: images serialized by frequency, on Vim and VMamba (arXiv 2410.10316)."""
