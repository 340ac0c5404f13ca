"""Retrieval with frozen features: images of the same part, and the revisited Oxford and Paris benchmarks."""

from dinov2.eval.retrieval.describers import RetrievalSettings
from dinov2.eval.retrieval.evaluation import GALLERIES, eval_retrieval, eval_revisited

__all__ = ["GALLERIES", "RetrievalSettings", "eval_retrieval", "eval_revisited"]
