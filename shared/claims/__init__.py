"""The claims ledger: metafiles and run records are read, statuses, tables and pages follow. It needs no torch."""
