"""Preprocessing of raw images by a chain of steps: brightness, texture and edges, regions."""

from dinov2.data.preprocessing.chain import STEPS, Chain, PreprocessingError
from dinov2.data.preprocessing.step import Frame, Placement, Step

__all__ = ["STEPS", "Chain", "Frame", "Placement", "PreprocessingError", "Step"]
