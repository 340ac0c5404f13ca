"""What a run tells people and programs: log files, metrics files, TensorBoard, progress lines and plots."""

from dinov2.logging.metric_logger import MetricLogger, SmoothedValue
from dinov2.logging.metrics_file import MetricsFile, read_metrics
from dinov2.logging.progress import ProgressReport, TrainingProgress
from dinov2.logging.run_log import RunLog
from dinov2.logging.setup import close_logging, logging_to, setup_logging

__all__ = [
    "MetricLogger",
    "MetricsFile",
    "ProgressReport",
    "RunLog",
    "SmoothedValue",
    "TrainingProgress",
    "close_logging",
    "logging_to",
    "read_metrics",
    "setup_logging",
]
