"""``python -m dinov2.eval.linear``: the same as ``dinov2 linear``."""

from dinov2.config.command_line import run_as

run_as("linear")
