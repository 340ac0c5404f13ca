"""Reading video files, cameras and network streams frame by frame."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame as DecodedFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dinov2.tasks.frame_order import FrameOrder
from dinov2.tasks.video_address import VideoAddress, locate_video
from dinov2.utils.errors import RunError

_NETWORK_SECONDS = 10.0  # a network stream that is silent for longer is taken for dead
_NOMINAL_RATE = Fraction(30)  # of cameras and streams that name none
_GREATEST_RATE = 1000  # frames per second; where the clock of a stream passes for its rate, it is 30,000 or 90,000
_CAMERA_PAUSE = 0.005  # seconds between two looks at a camera that has no frame yet
_MISSING_FRAMES = 1.5  # a file may end this much before its header says: players differ in how they count


class DamagedVideoError(RunError):
    """A video that cannot be read, or not to its end; everything before the damage was handed out.

    Attributes:
        frame: number of the first frame that is missing, from 0.
    """

    def __init__(self, name: str, frame: int, seconds: float, cause: str) -> None:
        """Names the video, how far it could be read, and what the decoder says."""
        done = f"the {frame} frames before it are done" if frame else "nothing could be read"
        super().__init__(f"video {name} is damaged at frame {frame} ({seconds:.2f} s): {cause}; {done}")
        self.frame = frame


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One frame.

    Attributes:
        number: from 0.
        seconds: since the first frame.
        pixels: uint8 ``[H, W, 3]``, RGB, upright.
    """

    number: int
    seconds: float
    pixels: NDArray[np.uint8]


@contextmanager
def words_of_decoders() -> Iterator[None]:
    """While entered, errors of FFmpeg carry what its decoders say; by default PyAV leaves only a number's meaning."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)  # nothing is printed
    try:
        yield
    finally:
        av.logging.set_level(level)


class VideoReader:
    """Frames of a video, once, in the order in which they are shown. Close it, or use it in a ``with`` block.

    A file ends at its first damage with a `DamagedVideoError`: decoders would rather invent the missing pixels, and a
    verdict on those is worse than none. Of a live source, frames that were damaged on the way are left out and counted.

    Args:
        source: as `locate_video` understands it, or what that returned.
        keep_going: treat damage in a file as that of a live source.

    Attributes:
        address: of the video.
        frame_rate: frames per second, the mean where it varies; as the file says, or 30 where nothing does.
        num_frames: how many there should be; None where that is unknown.
        live: whether frames are lost when nobody takes them.
        num_skipped: damaged pieces that were left out so far.
        pixel_aspect: width of a pixel over its height; right from the first frame on.

    Raises:
        FileNotFoundError: when there is no such file or device.
        DamagedVideoError: when it cannot be opened or holds no video.
    """

    def __init__(self, source: str | VideoAddress, *, keep_going: bool = False) -> None:
        self.address = locate_video(source) if isinstance(source, str) else source
        url, options = self.address.url, dict(self.address.options)
        network = _NETWORK_SECONDS if not self.address.file and self.address.format is None else None
        try:
            self._container = av.open(url, format=self.address.format, options=options, timeout=network)
        except (FFmpegError, OSError, ValueError) as error:
            raise DamagedVideoError(self.address.name, 0, 0.0, self._describe(error)) from error
        if not self._container.streams.video:
            self._container.close()
            raise DamagedVideoError(self.address.name, 0, 0.0, "it holds no pictures")
        self._stream = self._container.streams.video[0]
        self._is_avi = self._container.format.name == "avi"
        self.live = not self.address.file and self._container.duration is None
        self._tolerant = keep_going or self.live
        if not self._tolerant:
            self._stream.codec_context.options = {"err_detect": "explode"}
        self.frame_rate = _plausible_rate(self._stream)
        self.num_frames = self._expected_frames()
        self.pixel_aspect = Fraction(self._stream.sample_aspect_ratio or 1)
        self.num_skipped = 0

    def __iter__(self) -> Iterator[VideoFrame]:
        """Yields the frames.

        Raises:
            DamagedVideoError: where a file or the connection breaks off, after the last good frame.
        """
        number, seconds, first = 0, 0.0, None
        shape: tuple[int, ...] | None = None
        end = 0.0
        for frame in self._decoded():
            if isinstance(frame, str):
                raise DamagedVideoError(self.address.name, number, end, frame)
            first = frame.pts if first is None else first
            seconds = self._seconds(frame, first, number, seconds)
            quarter_turns = round(frame.rotation / 90)
            if number == 0 and quarter_turns % 2:
                self.pixel_aspect = 1 / self.pixel_aspect
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)
            if shape is not None and pixels.shape != shape:
                cause = f"the size changes from {shape[1]}x{shape[0]} to {pixels.shape[1]}x{pixels.shape[0]}"
                raise DamagedVideoError(self.address.name, number, seconds, cause)
            shape = pixels.shape
            yield VideoFrame(number, seconds, np.ascontiguousarray(pixels))
            number += 1
            end = seconds + max(
                float(1 / self.frame_rate), float((frame.duration or 0) * (self._stream.time_base or 0))
            )
        length = self._length(first)
        if number == 0 or (length is not None and end < length - _MISSING_FRAMES / float(self.frame_rate)):
            cause = "no frame could be decoded" if not number else f"the file ends before its {length:.2f} s are over"
            raise DamagedVideoError(self.address.name, number, end, cause)

    def close(self) -> None:
        """Closes the file or device; closing twice is harmless."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decoded(self) -> Iterator[DecodedFrame | str]:
        """Decoded frames; text last where the video is damaged: what is wrong."""
        packets = self._container.demux(self._stream)
        order = FrameOrder(known=not self._is_avi)  # AVI stores the order of decoding only
        begun = False
        while True:
            try:
                packet = next(packets, None)
            except BlockingIOError:  # a camera without a new frame
                time.sleep(_CAMERA_PAUSE)
                packets = self._container.demux(self._stream)
                continue
            except FFmpegError as error:
                yield from self._frames_before_damage(order)
                yield self._describe(error)
                return
            if packet is None:
                return
            begun = begun or packet.is_keyframe
            if self.address.file and packet.size and not begun:
                continue  # a recording that begins in the middle: nothing can be decoded before the first key frame
            frames = self._decode(packet)
            if not isinstance(frames, str):
                order.promise(packet.pts)
                for frame in frames:
                    order.take(frame)
                    yield frame
            elif self._tolerant:
                self.num_skipped += 1
            else:
                order.lose(packet.pts)
                yield from self._frames_before_damage(order)
                yield frames
                return

    def _decode(self, packet: "Packet[VideoStream]") -> list[DecodedFrame] | str:
        """Frames that a packet completes, or what is wrong with it."""
        try:
            frames = self._stream.codec_context.decode(packet if packet.size else None)
        except FFmpegError as error:
            return self._describe(error)
        return "a piece of it is missing" if packet.is_corrupt and not self._tolerant else frames

    def _frames_before_damage(self, order: FrameOrder) -> Iterator[DecodedFrame]:
        """Frames that the decoder still holds to bring them in order, up to the first that is lost."""
        try:
            frames = self._stream.codec_context.decode(None)
        except FFmpegError:
            return
        for frame in frames:
            if not order.is_next(frame):
                return
            order.take(frame)
            yield frame

    def _seconds(self, frame: DecodedFrame, first: int | None, number: int, previous: float) -> float:
        """Time since the first frame, strictly increasing; exact where the frames keep their rate."""
        seconds = regular = float(number / self.frame_rate)
        if frame.pts is not None and first is not None and self._stream.time_base is not None:
            seconds = float((frame.pts - first) * self._stream.time_base)
            if abs(seconds - regular) <= 1.01 * self._stream.time_base:  # coarse clocks round 1/30 s to 33 or 34 ms
                seconds = regular
        return seconds if number == 0 or seconds > previous else previous + float(1 / self.frame_rate)

    def _length(self, first: int | None = None) -> float | None:
        """Seconds that a file's header promises from the time stamp ``first`` on; None where it promises nothing."""
        if not self.address.file:
            return None
        if self._is_avi and self._stream.frames:  # its duration is what FFmpeg found
            return float(self._stream.frames / self.frame_rate)
        start = self._stream.start_time
        if self._stream.duration is not None and self._stream.time_base is not None:
            late = 0 if first is None or start is None else first - start
            return float((self._stream.duration - late) * self._stream.time_base)
        if self._container.duration is not None and len(self._container.streams) == 1:
            return self._container.duration / av.time_base
        return None

    def _expected_frames(self) -> int | None:
        length = self._length()
        if self._stream.frames:
            return self._stream.frames
        return None if length is None else max(round(length * self.frame_rate), 1)

    def _describe(self, error: Exception) -> str:
        """What went wrong, in FFmpeg's words, which may hold the address with its password."""
        return re.sub(r"^\[Errno -?\d+\] ", "", str(error)).replace(self.address.url, self.address.name)


def _plausible_rate(stream: VideoStream) -> Fraction:
    """Frames per second: the mean if the file knows it, else FFmpeg's guess; 30 where both make no sense."""
    rates = (stream.average_rate, stream.guessed_rate, _NOMINAL_RATE)
    return next(Fraction(rate) for rate in rates if rate and rate <= _GREATEST_RATE)
