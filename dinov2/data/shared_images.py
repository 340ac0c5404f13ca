"""Finding images that two sets share: the same file, or another file of the same content."""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

_CONTENTS = 200  # images of the second set whose content is looked for
_SIZES = 10_000  # files of the first set whose sizes are asked for
_CANDIDATES = 20  # files of one size that are read to find one content


def find_shared_images(first: ImageDataset, second: ImageDataset) -> tuple[list[tuple[Path, Path]], int]:
    """Pairs of images that two sets share, found in seconds also in large sets.

    All paths are compared; contents of a sample, with files of the same size: those of the same name first.

    Returns:
        Pairs of one path in each set, and how many images of the second set were looked at: all of them where paths
        are equal, else the sample.
    """
    known = {os.path.abspath(path): path for path in _paths(first)}
    paths = _paths(second)
    equal = [(known[name], path) for path in paths if (name := os.path.abspath(path)) in known]
    if equal:
        return equal, len(paths)
    by_size: dict[int, list[Path]] = defaultdict(list)
    names = {path.name for path in _spread(paths, _CONTENTS)}
    sized = [path for path in known.values() if path.name in names][:_SIZES] + _spread([*known.values()], _SIZES)
    for path in dict.fromkeys(sized):
        if (size := _size(path)) is not None:
            by_size[size].append(path)
    shared = []
    looked = _spread(paths, _CONTENTS)
    for path in looked:
        size = _size(path)
        alike = [] if size is None else by_size[size]
        candidates = sorted(alike, key=lambda other, name=path.name: other.name != name)[:_CANDIDATES]  # type: ignore[misc]
        match = next((other for other in candidates if _same_content(other, path)), None)
        if match is not None:
            shared.append((match, path))
    return shared, len(looked)


def warn_of_shared_images(sets: Mapping[str, ImageDataset]) -> int:
    """The main process warns of images that two of some sets share; datasets that are one object are left alone.

    Args:
        sets: by name, in the order in which they are used: train, val, test.

    Returns:
        How many were found; 0 in other processes.
    """
    if not is_main_process():
        return 0
    total = 0
    for (first, known), (second, other) in combinations(sets.items(), 2):
        if known is other:
            continue
        shared, looked = find_shared_images(known, other)
        if not shared:
            continue
        total += len(shared)
        one, two = shared[0]
        how = f"such as {two}" if os.path.abspath(one) == os.path.abspath(two) else f"such as {two}, the same as {one}"
        count = "all" if len(shared) == looked else f"{len(shared)} of"
        logger.warning(
            "%s %d images of %s that were looked at are in %s too, %s: scores of %s are better than they should be",
            count, looked, second, first, how, second,
        )  # fmt: skip
    return total


def _paths(dataset: ImageDataset) -> list[Path]:
    return [dataset.get_image_path(index) for index in range(len(dataset))]


def _spread(paths: list[Path], count: int) -> list[Path]:
    """At most so many paths, evenly spaced."""
    if len(paths) <= count:
        return paths
    return [paths[place] for place in np.linspace(0, len(paths) - 1, count).astype(int).tolist()]


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none, as for images inside archives."""
    try:
        return path.stat().st_size or None
    except OSError:
        return None


def _same_content(first: Path, second: Path) -> bool:
    try:
        return first.read_bytes() == second.read_bytes()
    except OSError:
        return False
