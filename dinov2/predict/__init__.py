"""Using a trained task model on images and video."""
