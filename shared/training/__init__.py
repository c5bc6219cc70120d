"""The machinery of a run: configuration, launching, resumption, ranks, non-finite steps. No model, no loss."""
