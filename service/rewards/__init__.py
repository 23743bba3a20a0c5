"""Graders: what a sampled answer is worth. Torch-free, because the API's dry run grades too.

Nothing is imported here: the sandbox's child, which is started for a single pattern too, has only what it needs.
"""
