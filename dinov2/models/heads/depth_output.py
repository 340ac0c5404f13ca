"""From scores to depth: how the last layer of a depth head is read.

Every output keeps to its range ``[min_depth, max_depth]`` in evaluation. In training nothing is cut off, since values
outside would get no gradient that brings them back.

Reference: bins: Bhat et al., AdaBins (2021), section 3.3; Fu et al., Deep Ordinal Regression Network (2018), section
3.2 (spacing-increasing discretisation).
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.features import Features

BIN_SPACINGS = ("UD", "SID", "SID_upstream")
BIN_NORMS = ("linear", "softmax", "sigmoid")
# What the linear norm adds to every bin, so that bins without evidence keep a gradient and no sum is 0.
LINEAR_NORM_FLOOR = 0.1


class DepthOutput(nn.Module, ABC):
    """Reads scores as depth; it has no parameters.

    Args:
        min_depth: smallest depth given, above 0, in the unit of the targets.
        max_depth: largest depth given.
        num_scores: channels ``K`` of scores that are read.

    Raises:
        ValueError: unless 0 < min_depth < max_depth < infinity.
    """

    def __init__(self, min_depth: float, max_depth: float, num_scores: int = 1) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth < math.inf:
            raise ValueError(f"depths must satisfy 0 < min_depth < max_depth, got {min_depth} and {max_depth}")
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.num_scores = num_scores

    @abstractmethod
    def read(self, scores: Tensor) -> Tensor:
        """Maps scores ``[B, K, h, w]``, at least float32, to depth ``[B, 1, h, w]`` that may leave the range."""

    def forward(self, scores: Tensor) -> Tensor:
        """Maps scores ``[B, K, h, w]`` to depth ``[B, 1, h, w]`` in float32 or better."""
        # Half precision has three digits: too few for a sum over hundreds of bins.
        depth = self.read(scores if scores.dtype == torch.float64 else scores.float())
        return depth if self.training else depth.clamp(self.min_depth, self.max_depth)


class DepthBins(DepthOutput):
    """Expected depth over bins whose probabilities are the scores.

    Args:
        min_depth: centre of the first bin.
        max_depth: centre of the last bin.
        num_bins: bins; 256 in the released heads.
        spacing: "UD" for equal steps, "SID" for equal ratios. "SID_upstream" is what the published code computes under
            the name SID: it takes 10 to the power of a depth that was never made a logarithm, so bins run from
            10^min_depth to 10^max_depth. No released head uses it.
        norm: "linear" (rectified scores plus 0.1, over their sum; the released heads), "softmax" or "sigmoid"
            (sigmoids over their sum).

    Raises:
        ValueError: for an unknown spacing or norm, fewer than 2 bins, or a range as in `DepthOutput`.
    """

    def __init__(
        self,
        min_depth: float,
        max_depth: float,
        *,
        num_bins: int = 256,
        spacing: str = "UD",
        norm: str = "linear",
    ) -> None:
        super().__init__(min_depth, max_depth, num_scores=num_bins)
        if spacing not in BIN_SPACINGS:
            raise ValueError(f"unknown spacing of bins {spacing!r}; allowed: {', '.join(BIN_SPACINGS)}")
        if norm not in BIN_NORMS:
            raise ValueError(f"unknown norm over bins {norm!r}; allowed: {', '.join(BIN_NORMS)}")
        if num_bins < 2:
            raise ValueError(f"depth needs at least 2 bins, got {num_bins}")
        self.spacing = spacing
        self.norm = norm

    def centres(self, like: Tensor) -> Tensor:
        """Depth of every bin ``[num_bins]``, rising, on the device and in the dtype of ``like``."""
        first, last = self.min_depth, self.max_depth
        if self.spacing == "UD":
            return torch.linspace(first, last, self.num_scores, device=like.device, dtype=like.dtype)
        if self.spacing == "SID":
            first, last = math.log10(first), math.log10(last)
        return torch.logspace(first, last, self.num_scores, device=like.device, dtype=like.dtype)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probability of every bin ``[B, K, h, w]``; sums to 1 over the bins."""
        if self.norm == "softmax":
            return scores.softmax(dim=1)
        evidence = scores.relu() + LINEAR_NORM_FLOOR if self.norm == "linear" else scores.sigmoid()
        return evidence / evidence.sum(dim=1, keepdim=True)

    def read(self, scores: Tensor) -> Tensor:
        # Not a matrix product: autocast would run that in half precision.
        return (self.probabilities(scores) * self.centres(scores)[:, None, None]).sum(dim=1, keepdim=True)


class ReluDepth(DepthOutput):
    """Rectified score plus ``min_depth``, as in the released DPT heads. Scores that are all negative learn nothing."""

    def read(self, scores: Tensor) -> Tensor:
        return scores.relu() + self.min_depth


class SigmoidDepth(DepthOutput):
    """Sigmoid of the score times ``max_depth`` (upstream's ``scale_up``)."""

    def read(self, scores: Tensor) -> Tensor:
        return scores.sigmoid() * self.max_depth


class SoftplusDepth(DepthOutput):
    """``min_depth`` plus the softplus of the score in units of the range: never flat, whatever the unit of depth."""

    def read(self, scores: Tensor) -> Tensor:
        return self.min_depth + F.softplus(scores) * (self.max_depth - self.min_depth)


class DepthFromScores(nn.Module):
    """A dense head and the output that reads its scores as depth.

    Args:
        decoder: maps features to scores ``[B, K, h', w']``, ``K`` as the output needs it.
        output: reads them.
    """

    def __init__(self, decoder: nn.Module, output: DepthOutput) -> None:
        super().__init__()
        self.decoder = decoder
        self.output = output

    def forward(self, features: Features) -> Tensor:
        """Maps features to depth ``[B, 1, h', w']``."""
        depth: Tensor = self.output(self.decoder(features))
        return depth
