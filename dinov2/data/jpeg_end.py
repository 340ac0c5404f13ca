"""JPEG files without an end marker: are they whole, as browsers take them to be, or cut?"""

import hashlib
import io
import re

from PIL import JpegImagePlugin

_START, _END, _MARKER = b"\xff\xd8", b"\xff\xd9", b"\xff"
_SEGMENT = re.compile(rb"\xff+[\x01-\xcf\xda-\xfe]")  # not what stands within coded rows, nor start and end
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SEQUENTIAL_FRAMES = (0xC0, 0xC1, 0xC3, 0xC5, 0xC9, 0xCB, 0xCD)
_SCAN = 0xDA
_FILLERS = (0x00, 0x55, 0xA3)


def with_end_marker(data: bytes) -> bytes | None:
    """A JPEG with the end marker that it lacks; None where more than that is missing.

    Decoders fill up missing rows without a word. So some bytes are put where the file ends: if they change the image,
    they were taken for rows of it.

    Args:
        data: content of a file that cannot be decoded as it is.
    """
    if not data.startswith(_START):
        return None
    data = data.removesuffix(_MARKER)
    try:
        if not _has_all_scans(data):
            return None
    except (IndexError, KeyError, ValueError):  # it is damaged
        return None
    ended = data + _END
    pixels = _pixels(ended)
    for byte in _FILLERS:
        filler = bytes([byte]) * 64
        # Where rows are restarted every so often, nothing is taken for an image without the marker that is due.
        restarts = b"".join(_MARKER + bytes([0xD0 + number % 8]) + filler for number in range(16))
        if pixels is None or pixels != _pixels(data + filler + restarts + _END):
            return None
    return ended


def _pixels(data: bytes) -> bytes | None:
    """A digest of them: several images at once may take more memory than there is."""
    try:
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
            return hashlib.sha256(image.tobytes()).digest()
    except (OSError, SyntaxError, ValueError):
        return None


def _has_all_scans(data: bytes) -> bool:
    """Whether every coefficient of every colour of a JPEG has its last scan in the file, be that whole or cut."""
    missing: dict[int, set[int]] = {}
    place, is_sequential = 2, True
    while (found := _SEGMENT.search(data, place)) is not None:
        kind, start = data[found.end() - 1], found.end()
        content = data[start + 2 : start + int.from_bytes(data[start : start + 2], "big")]
        if kind in _FRAMES:
            is_sequential = kind in _SEQUENTIAL_FRAMES
            missing = {content[6 + 3 * number]: set(range(64)) for number in range(content[5])}
        elif kind == _SCAN:
            first, last, bits = content[1 + 2 * content[0] :][:3]
            done = range(64) if is_sequential else range(first, last + 1) if bits % 16 == 0 else range(0)
            for number in range(content[0]):
                missing[content[1 + 2 * number]].difference_update(done)
        place = start + 2 + len(content)
    return bool(missing) and not any(missing.values())
