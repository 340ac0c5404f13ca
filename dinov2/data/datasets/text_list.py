"""Text files with one entry per line."""

from collections.abc import Sequence
from pathlib import Path


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


def find_text_list(folder: Path, names: Sequence[str]) -> Path:
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
