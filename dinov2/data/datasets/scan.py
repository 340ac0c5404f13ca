"""Finding image files in folders."""

import os
from collections.abc import Iterator
from pathlib import Path

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
     ".j2k", ".avif", ".pcx", ".tga")
)  # fmt: skip


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image, in any case, and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def find_folders(folder: Path) -> list[str]:
    """Names of the visible folders right inside a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def find_images(folder: Path) -> list[str]:
    """Paths of all images below a folder, relative to it, with ``/`` between folders, sorted.

    Links to folders are followed, each folder once; hidden files and folders are left out.
    """
    return sorted(_walk(str(folder), "", {os.path.realpath(folder)}))


def require_images(folder: Path) -> list[str]:
    """What `find_images` finds.

    Raises:
        ValueError: when that is nothing.
    """
    paths = find_images(folder)
    if not paths:
        raise ValueError(f"{folder} holds no image: nothing below it ends in {', '.join(sorted(IMAGE_EXTENSIONS))}")
    return paths


def _walk(folder: str, prefix: str, seen: set[str]) -> Iterator[str]:
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                subfolders.append((entry.path, f"{prefix}{entry.name}/"))
            elif is_image_name(entry.name):
                yield prefix + entry.name
    for path, name in sorted(subfolders):
        real = os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            yield from _walk(path, name, seen)
