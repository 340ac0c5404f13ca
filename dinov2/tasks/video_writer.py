"""Writing a video file that keeps the number, the times and the size of its frames."""

import contextlib
import math
import os
import secrets
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

_FINEST_TICKS, _MOST_TICKS = 10_000, 65_535  # per second; MPEG-4 stores the clock in 16 bits
_BT709 = 1  # code of these colours in files
_BITS_PER_PIXEL = 0.3  # of MPEG-4, which has no setting for constant quality


class VideoWriter:
    """Writes an MP4 file: H.264 where this build of FFmpeg has it (libx264), else MPEG-4.

    The file gets its name when it is complete: at the end of the ``with`` block, however that ends. Frames are written
    at the size they come in: an odd width or height needs chroma at full resolution with H.264 (``yuv444p``), which
    some players cannot show; `note` says so.

    Args:
        path: file to write; its folder must exist.
        frame_rate: frames per second.
        height: of the frames in pixels.
        width: of the frames in pixels.
        pixel_aspect: width of a pixel over its height.
        codec: FFmpeg's name of the encoder; by default the best of the two.

    Attributes:
        codec: of the file.
        note: what somebody who plays the file should know; usually empty.
        num_frames: written so far.

    Raises:
        OSError: when the folder cannot be written.
        ValueError: when the encoder does not take frames of this size.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        frame_rate: Fraction,
        height: int,
        width: int,
        pixel_aspect: Fraction = Fraction(1),
        codec: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
        odd = self.codec == "libx264" and (width % 2 or height % 2)
        self.note = f"{width}x{height} is odd: written as yuv444p, which some players cannot show" if odd else ""
        self.num_frames = 0
        self._pixel_format = "yuv444p" if odd else "yuv420p"
        self._clock = _clock(frame_rate)
        self._ticks = -1
        self._closed = False
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        # `file:` keeps a colon in a name from being taken for a protocol.
        self._container = av.open(f"file:{self._temporary}", "w", format="mp4", options={"movflags": "faststart"})
        stream = self._container.add_stream(self.codec, rate=frame_rate)
        assert isinstance(stream, VideoStream)
        self._stream = stream
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self._pixel_format
        context = self._stream.codec_context
        context.time_base = self._clock
        context.sample_aspect_ratio = pixel_aspect
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        if self.codec == "libx264":
            context.options = {"crf": "18", "preset": "veryfast"}
        else:
            context.bit_rate = max(int(_BITS_PER_PIXEL * width * height * frame_rate), 100_000)
        try:
            context.open()
        except FFmpegError as error:
            self._drop()
            raise ValueError(f"{self.path}: {self.codec} cannot encode frames of {width}x{height} ({error})") from error

    def write(self, picture: Image.Image | NDArray[np.uint8], seconds: float) -> None:
        """Appends a frame.

        Args:
            picture: RGB, or uint8 ``[H, W, 3]``.
            seconds: since the first frame; must increase.
        """
        pixels: NDArray[np.uint8] = np.asarray(picture)
        assert pixels.shape == (self._stream.height, self._stream.width, 3)
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = frame.reformat(format=self._pixel_format, dst_colorspace=Colorspace.ITU709)
        self._ticks = max(round(seconds / self._clock), self._ticks + 1)
        frame.pts, frame.time_base = self._ticks, self._clock
        self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def close(self) -> None:
        """Completes the file and gives it its name; without a single frame nothing is left. Twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if not self.num_frames:
            self._drop()
            return
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self._drop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop(self) -> None:
        with contextlib.suppress(FFmpegError):
            self._container.close()
        self._temporary.unlink(missing_ok=True)


def _clock(frame_rate: Fraction) -> Fraction:
    """Seconds per tick: fine enough for frames that come irregularly, and exact for those that keep the rate."""
    numerator = frame_rate.numerator
    if numerator > _MOST_TICKS:
        return Fraction(1, 60_000)
    return Fraction(1, numerator * math.ceil(_FINEST_TICKS / numerator))
