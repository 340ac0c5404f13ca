"""The dense heads of released models, under the names that users know.

`BNHead` is upstream's segmentation head of that name. Its depth head, also called BNHead there but without batch norm,
is `LinearDepthHead`.
"""

from dinov2.models.heads.depth import DepthBins, DPTHead, LinearDepthHead, ReluDepth, SigmoidDepth
from dinov2.models.heads.segmentation import BNHead

__all__ = ["BNHead", "DPTHead", "DepthBins", "LinearDepthHead", "ReluDepth", "SigmoidDepth"]
