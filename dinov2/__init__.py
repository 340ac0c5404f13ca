"""DINOv2 self-supervised pretraining for industrial images, grouped by part."""

__version__ = "0.1.0"
