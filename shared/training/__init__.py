"""What the papers' applications need and Lightning lacks: checks, ranks, resumption, skipped steps, a run."""
