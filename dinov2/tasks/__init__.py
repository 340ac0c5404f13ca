"""Task heads on a backbone: fine-tuning, inference on images and video, overlays and plots."""
