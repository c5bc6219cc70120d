"""What all five papers use: data sets, scores, the claims ledger and the machinery of a run."""
