"""Which photos a person means by files, folders and patterns, and what files about them are called."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dinov2.data.datasets.scan import find_images, is_image_name


@dataclass(frozen=True)
class FoundPhoto:
    """A file to predict for.

    Attributes:
        path: of the photo.
        stem: name, without extension, of all files about it; with folders where a folder was searched. Each is unique.
    """

    path: Path
    stem: str


def find_photos(inputs: Sequence[str], output_dir: Path) -> list[FoundPhoto]:
    """Finds photos: files as they are named, images in and below folders, and images that match patterns (``**`` too).

    A photo that is meant twice counts once. What lies in the output folder is no input.

    Raises:
        FileNotFoundError: when there is no such file or folder, or no photo in a folder or behind a pattern.
    """
    output = output_dir.resolve()
    photos: list[FoundPhoto] = []
    seen: set[Path] = set()
    stems: set[str] = set()
    for name in inputs:
        found = [(path, stem) for path, stem in _look_up(name) if not path.resolve().is_relative_to(output)]
        if not found:
            raise FileNotFoundError(f"no photo in {name}")
        for path, stem in found:
            real = path.resolve()
            if real not in seen:
                seen.add(real)
                photos.append(FoundPhoto(path, _unused(stem, stems)))
    return photos


def _look_up(name: str) -> Iterator[tuple[Path, str]]:
    path = Path(name)
    if path.is_file():
        yield path, path.stem
    elif path.is_dir():
        for inner in find_images(path):
            yield path / inner, PurePosixPath(inner).with_suffix("").as_posix()
    elif glob.has_magic(name):
        for match in map(Path, sorted(glob.glob(name, recursive=True))):
            if match.is_file() and is_image_name(match.name):
                yield match, match.stem
    else:
        raise FileNotFoundError(f"no file, folder or pattern: {name}")


def _unused(stem: str, stems: set[str]) -> str:
    """A stem that no other photo has, on any file system: these may not tell upper from lower case."""
    number, candidate = 1, stem
    while candidate.casefold() in stems:
        number += 1
        candidate = f"{stem}_{number}"
    stems.add(candidate.casefold())
    return candidate
