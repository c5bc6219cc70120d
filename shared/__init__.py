"""A library that the papers call: data sets, scores, training, the claims ledger, benchmarks."""
