"""Metrics that see a set in pieces: joining, sending and checking what they remember."""

import numpy as np
import pytest
import torch

from dinov2.eval.metrics.defects import ImageDefectMetrics, PixelDefectMetrics
from dinov2.eval.metrics.depth import DepthMetrics
from dinov2.eval.metrics.multi_label import MultiLabelMetrics
from dinov2.eval.metrics.segmentation import BoundaryMetrics, SegmentationMetrics
from dinov2.eval.metrics.streaming import StreamedMetric, as_array

CLASSES = ("good", "crack", "pore")
KINDS = {
    "segmentation": lambda: SegmentationMetrics(CLASSES),
    "boundary": lambda: BoundaryMetrics(CLASSES, tolerance=0.1),
    "pixels": PixelDefectMetrics,
    "images": ImageDefectMetrics,
    "depth": DepthMetrics,
    "labels": lambda: MultiLabelMetrics(CLASSES),
}


def pieces(kind: str) -> list[tuple]:
    """Arguments of six updates."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(6):
        masks = torch.randint(0, 3, (2, 9, 8), generator=generator)
        masks[0] = 0 if number % 2 else masks[0]
        masks[torch.rand(masks.shape, generator=generator) < 0.1] = 255
        labels = torch.randint(0, 3, masks.shape, generator=generator)
        scores = torch.rand(masks.shape, generator=generator)
        depth = (1 + scores).where(masks != 255, torch.nan)
        made.append(
            {
                "segmentation": (labels, masks),
                "boundary": (labels, masks),
                "pixels": (scores, masks),
                "images": (scores, masks, [f"part {number // 2}", f"a much longer name of part {number}"]),
                "depth": (1 + torch.rand(masks.shape, generator=generator), depth),
                "labels": (scores[0, :, :3], labels[0, :, :3] // 2),
            }[kind]
        )
    return made


def filled(kind: str, updates: list[tuple]) -> StreamedMetric:
    metric = KINDS[kind]()
    for update in updates:
        metric.update(*update)
    return metric


@pytest.mark.parametrize("kind", KINDS)
def test_joined_pieces_are_the_whole(kind: str) -> None:
    updates = pieces(kind)
    whole, first, second = filled(kind, updates), filled(kind, updates[:1]), filled(kind, updates[1:])
    before = second.compute()
    first.merge_state(second)
    assert len(whole.compute()) >= 2
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert second.compute() == before
    first.update(*updates[0])
    assert second.compute() == before  # nothing is shared between the two
    assert filled(kind, updates[::-1]).compute() == pytest.approx(whole.compute(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_metric_changes_nothing(kind: str) -> None:
    metric = filled(kind, pieces(kind))
    before = metric.compute()
    metric.merge_state(KINDS[kind]())
    metric.merge_processes()  # one process alone has nothing to add
    assert metric.compute() == before
    assert all(name.startswith("images") for name in KINDS[kind]().compute())  # counts of images alone


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_arrays_are_the_same(kind: str) -> None:
    updates = pieces(kind)
    arrays = [tuple(part.numpy() if isinstance(part, torch.Tensor) else part for part in update) for update in updates]
    for update in arrays:
        for part in update:
            if isinstance(part, np.ndarray):
                part.flags.writeable = False
    assert filled(kind, arrays).compute() == filled(kind, updates).compute()


def test_bfloat16_tensors_become_float32() -> None:
    array = as_array(torch.tensor([0.5, 3.0], dtype=torch.bfloat16, requires_grad=True))
    assert array.dtype == np.float32
    assert array.tolist() == [0.5, 3.0]


def test_a_metric_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="instance of SegmentationMetrics"):
        SegmentationMetrics(CLASSES).merge_state(PixelDefectMetrics())
