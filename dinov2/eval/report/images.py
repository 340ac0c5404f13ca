"""Images inside the page: small, and only as many bytes as a page may have."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dinov2.data.decoding import load_image

THUMBNAIL_PIXELS = 256
PICTURE_PIXELS = 1800
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a ``data:`` address with its size in pixels, or the reason why it cannot be shown."""

    address: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass
class ImageShelf:
    """Turns files into embedded images until the page is full.

    Args:
        most_bytes: of all images together, as they stand in the page.
    """

    most_bytes: int
    num_left_out: int = 0
    _used: int = 0
    _done: dict[tuple[str, int], EmbeddedImage] = field(default_factory=dict)

    def thumbnail(self, path: str | Path) -> EmbeddedImage:
        """A photo as a person would see it, as a JPEG of at most 256 pixels."""
        return self._embed(Path(path), THUMBNAIL_PIXELS)

    def picture(self, path: str | Path) -> EmbeddedImage:
        """A drawing: as it is, or smaller and as a JPEG where it is larger than a screen."""
        return self._embed(Path(path), PICTURE_PIXELS)

    def _embed(self, path: Path, pixels: int) -> EmbeddedImage:
        key = str(path), pixels
        if key not in self._done:
            self._done[key] = self._make(path, pixels)
        image = self._done[key]
        # The same address twice is twice as many bytes.
        if self._used + len(image.address) > self.most_bytes:
            self.num_left_out += 1
            return EmbeddedImage(problem="left out, as the report would become too large")
        self._used += len(image.address)
        return image

    def _make(self, path: Path, pixels: int) -> EmbeddedImage:
        try:
            if not path.is_file():
                return EmbeddedImage(problem="the file is no longer there")
            image = load_image(path)
            if pixels == PICTURE_PIXELS and path.suffix.lower() == ".png" and max(image.size) <= pixels:
                return EmbeddedImage(_address("png", path.read_bytes()), *image.size)
        except (OSError, ValueError) as error:
            return EmbeddedImage(problem=f"the file cannot be read: {error}")
        image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
        return EmbeddedImage(_address("jpeg", _jpeg(image)), *image.size)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
    return file.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
