"""Clips made by tests."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def moving_frames(count: int, height: int = 48, width: int = 64, seed: int = 0) -> list[NDArray[np.uint8]]:
    """A texture that moves, with a red block that moves the other way."""
    texture = np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)
    frames = []
    for number in range(count):
        frame = np.roll(texture, 2 * number, axis=1).copy()
        left = (width - 3 * number) % max(width - width // 3, 1)
        frame[height // 4 : 3 * height // 4, left : left + width // 3] = (230, 20, 20)
        frames.append(frame)
    return frames


def write_clip(
    path: Path,
    frames: list[NDArray[np.uint8]],
    *,
    rate: Fraction = Fraction(25),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    seconds: list[float] | None = None,
    rotation: int = 0,
    bframes: int = 2,
    faststart: bool = True,
) -> Path:
    """Writes a clip whose header stands first, so that it can be cut off; ``seconds`` gives irregular times."""
    options = {"movflags": "faststart"} if faststart and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = 12
        stream.codec_context.max_b_frames = bframes
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if seconds is not None:
                frame.pts, frame.time_base = round(seconds[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode(path: Path) -> list[NDArray[np.uint8]]:
    """Frames of a whole clip, by PyAV alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def facts(path: Path) -> tuple[int, int, int, Fraction | None]:
    """Number of frames, height, width and rate of a clip."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(video=0)), stream.height, stream.width, stream.average_rate
