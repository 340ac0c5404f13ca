"""Reading video files, cameras and network streams frame by frame."""

import contextlib
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame as DecodedFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from dinov2.utils.errors import RunError

_PROTOCOLS = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "rtp", "udp", "srt")
_CAMERAS = {"linux": ("v4l2", "/dev/video{}", {}), "darwin": ("avfoundation", "{}", {"framerate": "30"})}


@dataclass(frozen=True)
class VideoAddress:
    """Where a video comes from.

    Attributes:
        name: for people and messages; without passwords.
        stem: beginning of the names of files about it.
        url: as FFmpeg takes it.
        format: FFmpeg's name of the input format; None where the content tells.
        options: of that format.
        file: whether it is a file on a disk.
    """

    name: str
    stem: str
    url: str
    format: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    file: bool = False


def locate_video(source: str, platform: str = sys.platform) -> VideoAddress:
    """Understands what a person calls a video: a file, a camera's number or device, or the address of a stream.

    Raises:
        FileNotFoundError: when there is no such file or device.
        ValueError: when a camera is asked for by number where that is not supported, or a stream by a protocol that is
            not allowed.
    """
    if source.isdecimal():
        if platform not in _CAMERAS:
            raise ValueError(f"camera {source}: cameras have numbers on Linux and macOS only, not on {platform}")
        form, url, options = _CAMERAS[platform]
        address = VideoAddress(f"camera {source}", f"camera_{source}", url.format(source), form, tuple(options.items()))
        if url.startswith("/") and not Path(address.url).exists():
            raise FileNotFoundError(f"camera {source}: there is no {address.url}")
        return address
    source = re.sub("^file://(?=/)", "", source)
    if "://" in source:
        protocol, place = source.split("://", 1)
        if protocol.lower() not in _PROTOCOLS:  # FFmpeg has others that read, join and cut files of this machine
            raise ValueError(
                f"{protocol[:40]}:// is no protocol that videos are read by; allowed are "
                f"{', '.join(f'{name}://' for name in _PROTOCOLS)}, files, and numbers of cameras"
            )
        place = place.rpartition("@")[2]  # what stands before it is a user and a password
        words = "".join(letter if letter.isalnum() else "_" for letter in place)
        return VideoAddress(f"{protocol}://{place}", words.strip("_") or "stream", source)
    path = Path(source)
    if path.is_char_device():
        return VideoAddress(source, path.name, source, "v4l2")
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {source}")
    return VideoAddress(source, path.stem, f"file:{path}", file=True)  # a name such as concat:a would be obeyed


_FINEST_TICKS, _MAX_TICKS = 10_000, 65_535  # per second; MPEG-4 stores the clock in 16 bits
_BT709 = 1  # code of these colours in files
_BITS_PER_PIXEL = 0.3  # of MPEG-4, which has no setting for constant quality


class VideoWriter(AbstractContextManager["VideoWriter"]):
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
        # Seconds per tick: fine enough for frames that come irregularly, and exact for those that keep the rate.
        rate = frame_rate.numerator
        ticks = 60_000 if rate > _MAX_TICKS else rate * math.ceil(_FINEST_TICKS / rate)
        self._clock = Fraction(1, ticks)
        self._ticks = -1
        self._closed = False
        # No name of `temporary_path`: FFmpeg locks nothing, so a run that starts in the folder would delete it.
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.part")
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
        frame = DecodedFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def _drop(self) -> None:
        with contextlib.suppress(FFmpegError):
            self._container.close()
        self._temporary.unlink(missing_ok=True)


class _FrameOrder:
    """Tells frames that follow one another from those before which one is lost; none is where no order is ``known``."""

    # Decoders hand out frames in the order in which they are shown, later than they took the packets. When a packet is
    # damaged they drop a frame or two, keep others, and show the damaged one as well.
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

    def take(self, frame: DecodedFrame) -> None:
        """The decoder gave this frame."""
        if frame.pts is None:
            return
        if self._last is not None:
            self._sorted = self._sorted and frame.pts > self._last
        self._promised = {pts for pts in self._promised if pts > frame.pts}
        self._last = frame.pts

    def is_next(self, frame: DecodedFrame) -> bool:
        """Whether no frame was lost before this one, as far as that is known."""
        if not self._sorted or frame.pts is None or not self._promised:
            return False
        return frame.pts == min(self._promised) and (self._lost is None or frame.pts < self._lost)


_NETWORK_SECONDS = 10.0  # a network stream that is silent for longer is taken for dead
_NOMINAL_RATE = Fraction(30)  # of cameras and streams that name none
_GREATEST_RATE = 1000  # frames per second; where the clock of a stream passes for its rate, it is 30,000 or 90,000
_CAMERA_PAUSE = 0.005  # seconds between two looks at a camera that has no frame yet
_TS_PACKET, _TS_SYNC = 188, 0x47  # bytes of a packet of a transport stream, and the first of each
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


def _ends_within_packet(path: str) -> bool:
    """Whether a transport stream is cut off inside one of its packets of 188 bytes, which begin with the same byte.

    Streams of other packets (192 or 204 bytes) are not looked at.
    """
    with open(path, "rb") as file:
        head = file.read(4 * _TS_PACKET)
        size = file.seek(0, 2)
    starts = (at for at in range(_TS_PACKET) if set(head[at::_TS_PACKET][:3]) == {_TS_SYNC})
    first = next(starts, None)
    return first is not None and (size - first) % _TS_PACKET != 0


class VideoReader(AbstractContextManager["VideoReader"]):
    """Frames of a video, once, in the order in which they are shown. Close it, or use it in a ``with`` block.

    A file ends at its first damage with a `DamagedVideoError`: decoders would rather invent the missing pixels, and a
    prediction for those is worse than none. Of a live source, frames damaged on the way are left out and counted.

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
        self._is_cut = (
            self.address.file
            and self._container.format.name == "mpegts"
            and _ends_within_packet(url.removeprefix("file:"))
        )
        self.live = not self.address.file and self._container.duration is None
        self._tolerant = keep_going or self.live
        if not self._tolerant:
            self._stream.codec_context.options = {"err_detect": "explode"}
        rates = (self._stream.average_rate, self._stream.guessed_rate, _NOMINAL_RATE)
        self.frame_rate = next(Fraction(rate) for rate in rates if rate and rate <= _GREATEST_RATE)
        length = self._length()
        expected = None if length is None else max(round(length * self.frame_rate), 1)
        self.num_frames = self._stream.frames or expected
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
            previous, seconds = seconds, float(number / self.frame_rate)
            if frame.pts is not None and first is not None and self._stream.time_base is not None:
                stamped = float((frame.pts - first) * self._stream.time_base)
                # Exact where the frames keep their rate: coarse clocks round 1/30 s to 33 or 34 ms.
                if abs(stamped - seconds) > 1.01 * self._stream.time_base:
                    seconds = stamped
            if number and seconds <= previous:
                seconds = previous + float(1 / self.frame_rate)
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def _decoded(self) -> Iterator[DecodedFrame | str]:
        """Decoded frames; text last where the video is damaged: what is wrong."""
        packets = self._container.demux(self._stream)
        order = _FrameOrder(known=not self._is_avi)  # AVI stores the order of decoding only
        begun = False
        ahead: Packet[VideoStream] | None = None
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
            if self._is_cut and not self._tolerant:  # the decoder may not notice what its last packet lacks
                packet, ahead = ahead, packet
                if packet is None:
                    continue
                if ahead is None or not ahead.size:
                    order.lose(packet.pts)
                    yield from self._frames_before_damage(order)
                    yield "it ends within a packet of its transport stream"
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

    def _frames_before_damage(self, order: _FrameOrder) -> Iterator[DecodedFrame]:
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

    def _describe(self, error: Exception) -> str:
        """What went wrong, in FFmpeg's words, which may hold the address with its password."""
        return re.sub(r"^\[Errno -?\d+\] ", "", str(error)).replace(self.address.url, self.address.name)
