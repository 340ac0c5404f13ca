"""Logistic regression on frozen features, its strength chosen on held-out parts."""

from dinov2.eval.log_regression.evaluation import eval_log_regression, score_features
from dinov2.eval.log_regression.model import LogRegressionModel, LogRegressionSettings, load_log_regression

__all__ = [
    "LogRegressionModel",
    "LogRegressionSettings",
    "eval_log_regression",
    "load_log_regression",
    "score_features",
]
