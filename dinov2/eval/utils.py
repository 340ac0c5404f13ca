"""The names that evaluators share, under the path that users know.

The project's own modules import from where the parts live: torchmetrics alone takes seconds to import.
"""

from torchmetrics import MetricCollection

from dinov2.eval.features import ModelWithNormalize
from dinov2.logging import MetricLogger

__all__ = ["MetricCollection", "MetricLogger", "ModelWithNormalize"]
