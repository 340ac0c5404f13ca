"""Linear evaluation: the published grid of linear classifiers on frozen features, trained in one pass."""

from dinov2.eval.linear.evaluation import eval_linear
from dinov2.eval.linear.training import LinearProtocol

__all__ = ["LinearProtocol", "eval_linear"]
