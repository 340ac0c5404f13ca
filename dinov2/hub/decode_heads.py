"""The dense heads of released models, under the names that users know.

`BNHead` is upstream's segmentation head of that name. Its depth head, also called BNHead there but without batch norm,
is `LinearDepthHead`.
"""

from dinov2.models.heads.bn_linear import BNHead
from dinov2.models.heads.depth_output import DepthBins, ReluDepth, SigmoidDepth
from dinov2.models.heads.dpt import DPTHead
from dinov2.models.heads.linear_depth import LinearDepthHead

__all__ = ["BNHead", "DPTHead", "DepthBins", "LinearDepthHead", "ReluDepth", "SigmoidDepth"]
