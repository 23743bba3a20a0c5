"""Faults made for real: processes killed, servers taken away, files torn. And the oracle that says whether it mattered."""
