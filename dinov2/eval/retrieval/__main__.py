"""``python -m dinov2.eval.retrieval``: the same as ``dinov2 retrieval``."""

from dinov2.config.command_line import run_as

run_as("retrieval")
