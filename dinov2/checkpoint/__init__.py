"""Checkpoints of a run: rank files, their integrity, gathering, merging and restoring."""
