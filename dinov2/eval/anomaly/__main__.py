"""``python -m dinov2.eval.anomaly``: the same as ``dinov2 anomaly``."""

from dinov2.config.command_line import run_as

run_as("anomaly")
