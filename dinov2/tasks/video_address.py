"""What a person calls a video: a file, a camera or the address of a stream."""

import sys
from dataclasses import dataclass
from pathlib import Path

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
        ValueError: when a camera is asked for by number where that is not supported.
    """
    if source.isdecimal():
        if platform not in _CAMERAS:
            raise ValueError(f"camera {source}: cameras have numbers on Linux and macOS only, not on {platform}")
        form, url, options = _CAMERAS[platform]
        address = VideoAddress(f"camera {source}", f"camera_{source}", url.format(source), form, tuple(options.items()))
        if url.startswith("/") and not Path(address.url).exists():
            raise FileNotFoundError(f"camera {source}: there is no {address.url}")
        return address
    if "://" in source:
        protocol, place = source.split("://", 1)
        place = place.rpartition("@")[2]  # what stands before it is a user and a password
        words = "".join(letter if letter.isalnum() else "_" for letter in place)
        return VideoAddress(f"{protocol}://{place}", words.strip("_") or "stream", source)
    path = Path(source)
    if path.is_char_device():
        return VideoAddress(source, path.name, source, "v4l2")
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {source}")
    return VideoAddress(source, path.stem, f"file:{path}", file=True)  # a name such as concat:a would be obeyed
