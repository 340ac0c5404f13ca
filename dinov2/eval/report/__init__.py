"""A run as one HTML file that can be read anywhere: options, curves, results, pictures and worst mistakes."""

from dinov2.eval.report.page import write_report

__all__ = ["write_report"]
