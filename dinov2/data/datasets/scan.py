"""Lists of image files: scanned from folders or read from text, checked, and kept small in memory."""

import logging
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import readable_endings

logger = logging.getLogger("dinov2")

# Folders that storage, operating systems and tools keep beside a user's, in lower case; hidden ones begin with a dot.
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
     "__pycache__", "lost+found", "system volume information", "found.000", "temporary items", "network trash folder")
)  # fmt: skip
_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
# Endings of images that are not read: these are missed, where a text beside the images is not.
_OTHER_IMAGES = frozenset(
    (".heic", ".heif", ".hif", ".jxl", ".jxr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".raw",
     ".psd", ".exr", ".hdr", ".dcm", ".dicom", ".fits", ".svs", ".czi", ".nd2", ".svg", ".pdf", ".zip", ".tar", ".tgz",
     ".gz", ".7z", ".rar", ".mp4", ".avi", ".mov", ".mkv")
)  # fmt: skip
_MOST_ENDINGS = 8  # that the line about files left out names


class LeftOut:
    """What scans passed over, to be said in one line.

    Attributes:
        endings: files that are no images by their name, by ending.
        folders: the system folders met, by name.
        hidden: number of hidden files and folders, and of files that systems make.
    """

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.folders: Counter[str] = Counter()
        self.hidden = 0

    def __str__(self) -> str:
        """Such as ``3 .heic, 1 .txt, folders of the system (@eaDir)``; empty for nothing."""
        common = sorted(self.endings.items(), key=lambda item: (-item[1], item[0] or "~"))
        parts = [f"{count} {ending or 'without an ending'}" for ending, count in common[:_MOST_ENDINGS]]
        if rest := sum(count for _, count in common[_MOST_ENDINGS:]):
            parts.append(f"{rest} with other endings")
        if self.folders:
            parts.append(f"{self.folders.total()} folders of the system ({', '.join(sorted(self.folders))})")
        if self.hidden:
            parts.append(f"{self.hidden} hidden files or folders")
        return ", ".join(parts)

    def takes(self, path: str) -> bool:
        """Whether a path is of an image in no system folder; keeps count of the others."""
        *folders, name = path.split("/")
        system = next((folder for folder in folders if is_system_folder(folder) and folder not in (".", "..")), None)
        if system is not None and not system.startswith("."):
            self.folders[system] += 1
        elif system is not None or name.startswith(".") or name.lower() in _SYSTEM_FILES:
            self.hidden += 1
        elif is_image_name(name):
            return True
        else:
            self.endings[os.path.splitext(name)[1].lower()] += 1
        return False

    def log(self, folder: Path) -> None:
        """Says it, as a warning where images of other formats, archives or videos are among it."""
        if text := str(self):
            missed = not _OTHER_IMAGES.isdisjoint(self.endings)
            logger.log(
                logging.WARNING if missed else logging.INFO,
                "%s: left out, as no images that can be read: %s%s",
                folder, text, "; convert images among them, to PNG for example" if missed else "",
            )  # fmt: skip


def index_by_stem(folder: Path) -> dict[str, list[str]]:
    """Images below a folder by their path without the ending, in the composed form of Unicode; see `find_images`."""
    found: dict[str, list[str]] = {}
    for path in find_images(folder):
        found.setdefault(stem_of(path), []).append(path)
    return found


def stem_of(path: str) -> str:
    """A path without its ending, in the composed form of Unicode."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def is_image_name(name: str) -> bool:
    """Whether a file name has an ending that the decoder reads, in any case, and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in readable_endings()


def is_system_folder(name: str) -> bool:
    """Whether a folder is hidden, or kept by a storage, an operating system or a tool, such as ``@eaDir``."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def find_folders(folder: Path) -> list[str]:
    """Names of the folders right inside a folder, sorted, without those that `is_system_folder` knows."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_system_folder(entry.name))


def find_split_folder(folder: Path, split: str) -> Path:
    """The folder inside another one that holds a split, named in any case.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when there are several.
    """
    folders = find_folders(folder)
    wanted = unicodedata.normalize("NFC", str(split).strip().lower())
    matches = [name for name in folders if unicodedata.normalize("NFC", name.lower()) == wanted]
    if not matches:
        found = ", ".join(folders[:10]) or "no folder"
        raise FileNotFoundError(
            f"{folder} has no folder for split {split!r} (such as TRAIN, VAL, TEST); it has {found}"
        )
    if len(matches) > 1:
        raise ValueError(f"{folder} has {len(matches)} folders for split {split!r}: {', '.join(matches)}; keep one")
    return folder / matches[0]


def find_images(folder: Path, left_out: LeftOut | None = None) -> list[str]:
    """Paths of all images below a folder, relative to it, with ``/`` between folders, sorted.

    Links to folders are followed, each folder once; hidden files and folders, and those of systems, are left out.

    Args:
        folder: where to look.
        left_out: is told what is left out; without it, the log is, in one line.
    """
    found = LeftOut() if left_out is None else left_out
    paths = sorted(_walk(str(folder), "", {os.path.realpath(folder)}, found))
    if left_out is None:
        found.log(folder)
    return paths


def require_images(folder: Path) -> list[str]:
    """What `find_images` finds.

    Raises:
        ValueError: when that is nothing.
    """
    left_out = LeftOut()
    paths = find_images(folder, left_out)
    if not paths:
        there = f" (it holds {left_out})" if str(left_out) else ""
        raise ValueError(
            f"{folder} holds no image{there}: nothing below it ends in {', '.join(sorted(readable_endings()))}"
        )
    left_out.log(folder)
    return paths


def _walk(folder: str, prefix: str, seen: set[str], left_out: LeftOut) -> Iterator[str]:
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                if name.startswith("."):
                    left_out.hidden += 1
                elif is_system_folder(name):
                    left_out.folders[name] += 1
                else:
                    subfolders.append((entry.path, f"{prefix}{name}/"))
            elif is_image_name(name):
                yield prefix + name
            else:
                left_out.takes(name)  # keeps count of it
    for path, name in sorted(subfolders):
        real = os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            yield from _walk(path, name, seen, left_out)


# Paths that need a closer look: absolute, with a drive or a scheme, or not in their shortest form.
_UNUSUAL_PATH = re.compile(r"^$|^/|^[A-Za-z][A-Za-z0-9+.-]*:[/\\]|\\|\0|//|(?:^|/)\.{1,2}(?:/|$)|/$").search
# What one of them has in common when all paths are joined by line feeds: searching once is ten times faster.
_UNUSUAL_HINTS = ("\n/", "\n.", "\n\n", "/\n", "//", "/.", "\\", "\0", ":")


def shorten_paths(paths: list[str]) -> Iterator[tuple[int, str]]:
    """Brings paths into their shortest form, in place, and gives those that cannot be used with the reason.

    A million paths take a moment, as they are looked at one by one only where some are unusual.

    Yields:
        Position of an unusable path and what is wrong with it; the path is left as it is.
    """
    joined = "\n".join(["", *paths, ""])
    if not any(hint in joined for hint in _UNUSUAL_HINTS):
        return
    for position, path in enumerate(paths):
        if _UNUSUAL_PATH(path):
            reason = _why_unusable(path)
            if reason is None:
                paths[position] = posixpath.normpath(path)
            else:
                yield position, reason


def _why_unusable(path: str) -> str | None:
    if not path:
        return "is empty"
    if "\\" in path:
        return "has a backslash; write / between folders"
    if "\0" in path:
        return "has a null character"
    if path.startswith("/") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", path):
        return "is absolute; paths must be relative to the set's root"
    short = posixpath.normpath(path)
    if short == ".." or short.startswith("../"):
        return "leaves the set's root"
    if short == "." or path.endswith("/"):
        return "names a folder"
    return None


def read_text_list(path: Path) -> tuple[list[str], list[int]]:
    """Reads the lines of a file that are not empty, stripped.

    Returns:
        The lines, and their numbers from 1.

    Raises:
        ValueError: when the file is not UTF-8, or holds no line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at position {error.start}; save it as UTF-8") from None
    entries = [(line.strip(), number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not entries:
        raise ValueError(f"{path} lists nothing")
    return [line for line, _ in entries], [number for _, number in entries]


def find_text_list(folder: Path, *names: str) -> Path:
    """The first of some files that a folder holds.

    Raises:
        FileNotFoundError: when the folder is missing, or holds none of them; naming the lists that it has.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        found = ", ".join(sorted(other.name for other in folder.glob("*.txt"))) or "no list"
        raise FileNotFoundError(f"{folder} holds no {' or '.join(names)}; it has {found}")
    return path


class CompactStrings(Sequence[str]):
    """An immutable sequence of strings.

    A Python list of a million paths costs about 120 bytes per path, and forked workers copy it page by page because
    reading a string changes its reference count. Here the characters lie in one buffer, which workers share.

    Attributes:
        bytes: the UTF-8 of all strings, one after another, uint8 ``[M]``.
        ends: 0 and then the end of each string in ``bytes``, int64 ``[N + 1]``.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Copies the strings."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        self.ends: npt.NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])

    @classmethod
    def from_arrays(cls, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> Self:
        """Takes the two arrays of another instance.

        Raises:
            ValueError: when they do not belong together.
        """
        if data.dtype != np.uint8 or ends.dtype != np.int64 or data.ndim != 1 or ends.ndim != 1 or not len(ends):
            raise ValueError(f"not the arrays of strings: {data.dtype} {data.shape} and {ends.dtype} {ends.shape}")
        if ends[0] != 0 or ends[-1] != len(data) or (np.diff(ends) < 0).any():
            raise ValueError("the ends of the strings do not fit their bytes")
        strings = cls(())
        strings.bytes, strings.ends = data, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[str]:
        data, ends = self.bytes.tobytes(), self.ends.tolist()
        return (data[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(ends))

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} strings")
        position = index % len(self)
        start, end = self.ends[position], self.ends[position + 1]
        return self.bytes[start:end].tobytes().decode("utf-8", "surrogatepass")
