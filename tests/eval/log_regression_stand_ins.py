"""Labelled features in memory, for tests of the logistic regression."""

import numpy as np
import torch

from dinov2.eval.features import Features


def make_features(labels: list[int], groups: list[str] | None = None, *, seed: int = 0, gap: float = 2.0) -> Features:
    """Noise around one centre per class; by default every image is a part of its own."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(77).normal(size=(10, 12)) * gap
    embeddings = centres[labels] + generator.normal(size=(len(labels), 12))
    return Features(
        embeddings=torch.from_numpy(embeddings).float(),
        labels=torch.tensor(labels),
        group_ids=[f"set {seed} part {row}" for row in range(len(labels))] if groups is None else groups,
        paths=[f"set {seed}/{row}.png" for row in range(len(labels))],
    )
