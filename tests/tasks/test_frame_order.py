"""Which frames may still be shown when a video is damaged."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("av")

from dinov2.predict.video_files import FrameOrder


def frame(pts: int | None) -> Any:
    return SimpleNamespace(pts=pts)


def order_after(*packets: int | None, shown: tuple[int, ...] = (), known: bool = True) -> FrameOrder:
    order = FrameOrder(known=known)
    for pts in packets:
        order.promise(pts)
    for pts in shown:
        order.take(frame(pts))
    return order


def test_frames_follow_up_to_the_lost_one() -> None:
    order = order_after(0, 6, 2, 4, 9, shown=(0, 2))
    order.lose(9)
    assert order.is_next(frame(4))
    assert not order.is_next(frame(6))  # the decoder dropped 4
    order.take(frame(4))
    assert order.is_next(frame(6))
    order.take(frame(6))
    assert not order.is_next(frame(9))  # decoders show the damaged frame as well


def test_without_known_times_no_frame_is_the_next() -> None:
    assert not order_after(0, 1, shown=(0,), known=False).is_next(frame(1))
    assert not order_after(0, 1, shown=(0,)).is_next(frame(None))
    assert not order_after(0, None, shown=(0,)).is_next(frame(1))
    jumping = order_after(0, 1, 2, 3, shown=(1, 0))
    assert not jumping.is_next(frame(2))
    lost = order_after(0, 1, shown=(0,))
    lost.lose(None)
    assert not lost.is_next(frame(1))


def test_a_failure_that_is_no_packets_loses_nothing() -> None:
    assert order_after(0, 1, shown=(0,)).is_next(frame(1))
