"""Anomaly detection from good parts only, with a frozen backbone."""

from dinov2.eval.anomaly.evaluation import eval_anomaly

__all__ = ["eval_anomaly"]
