"""Batched loss requests: work orders taken from Redis, checked, merged, computed, answered. Nothing of a job in here."""
