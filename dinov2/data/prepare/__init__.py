"""Turning public and drawn sets into the grouped layout that `dinov2.data.datasets.GroupedJSON` reads."""
