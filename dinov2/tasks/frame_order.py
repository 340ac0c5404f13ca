"""Which frames a decoder still holds may be shown when the video is damaged."""

from av.video.frame import VideoFrame


class FrameOrder:
    """Tells frames that follow one another from those before which one is lost.

    Decoders hand out frames in the order in which they are shown, later than they took the packets. When a packet is
    damaged they drop a frame or two, keep others, and show the damaged one as well.

    Args:
        known: whether time stamps tell in which order frames are shown; otherwise no frame is known to be the next.
    """

    def __init__(self, *, known: bool) -> None:
        self._promised: set[int] = set()
        self._last: int | None = None
        self._sorted = known
        self._lost: int | None = None

    def promise(self, pts: int | None) -> None:
        """A packet with this time stamp was given to the decoder."""
        if pts is not None:
            self._promised.add(pts)

    def lose(self, pts: int | None) -> None:
        """The packet with this time stamp was damaged: neither its frame nor a later one may follow."""
        self._lost = pts
        self._sorted = self._sorted and pts is not None

    def take(self, frame: VideoFrame) -> None:
        """The decoder gave this frame."""
        if frame.pts is None:
            return
        if self._last is not None:
            self._sorted = self._sorted and frame.pts > self._last
        self._promised = {pts for pts in self._promised if pts > frame.pts}
        self._last = frame.pts

    def is_next(self, frame: VideoFrame) -> bool:
        """Whether no frame was lost before this one, as far as that is known."""
        if not self._sorted or frame.pts is None or not self._promised:
            return False
        return frame.pts == min(self._promised) and (self._lost is None or frame.pts < self._lost)
