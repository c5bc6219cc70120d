"""Scores, statistics over seeds, run records and the claims ledger of every paper."""
