"""The claims ledger: what the papers claim, what was measured, the status that follows, tables and the report.

It reads metafiles and run records and needs no torch; what it asks of a paper's code stands in ``protocol.py``.
"""
