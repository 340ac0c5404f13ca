"""``python -m dinov2.eval.log_regression``: the same as ``dinov2 log_regression``."""

from dinov2.config.command_line import run_as

run_as("log_regression")
