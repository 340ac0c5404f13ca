"""``python -m dinov2.eval.report``: the same as ``dinov2 report_run``."""

from dinov2.config.command_line import run_as

run_as("report_run")
