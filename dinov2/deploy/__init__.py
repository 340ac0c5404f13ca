"""Trained networks for other programs and runtimes."""
