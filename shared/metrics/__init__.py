"""Scores, statistics over seeds, and the names under which tables print them."""
