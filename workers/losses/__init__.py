"""Batched loss requests: take work orders from Redis, check, merge, compute, answer. Nothing here depends on jobs."""
