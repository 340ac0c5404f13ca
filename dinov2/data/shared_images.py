"""Finding images that two sets share: the same file, or another file of the same content."""

import filecmp
import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

_CONTENTS = 200  # images of the second set whose content is looked for
_SIZES = 10_000  # files of the first set whose sizes are asked for
_CANDIDATES = 20  # files of one size, of the same name and of others, that are read to find one content


def find_shared_images(first: ImageDataset, second: ImageDataset) -> tuple[list[tuple[str, str]], int]:
    """Pairs of images that two sets share, found in seconds also in large sets.

    All paths are compared; contents of a sample, with files of the same size: those of the same name first.

    Returns:
        Pairs of one path in each set, and how many images of the second set were looked at: all of them where paths
        are equal, else the sample.
    """
    known, paths = first.get_image_paths(), second.get_image_paths()
    equal = sorted(set(known) & set(paths))
    if equal:
        return [(path, path) for path in equal], len(paths)
    looked = _spread(paths, _CONTENTS)
    names = {os.path.basename(path) for path in looked}
    by_size: dict[int, list[str]] = defaultdict(list)
    of_those_names = [path for path in known if os.path.basename(path) in names]
    for path in dict.fromkeys([*of_those_names[:_SIZES], *_spread(known, _SIZES)]):
        if (size := _size(path)) is not None:
            by_size[size].append(path)
    shared = []
    for path in looked:
        size, name = _size(path), os.path.basename(path)
        alike = [] if size is None else by_size.get(size, [])
        candidates = [other for other in alike if os.path.basename(other) == name][:_CANDIDATES]
        candidates += [other for other in alike if os.path.basename(other) != name][:_CANDIDATES]
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
        how = f"such as {two}" if one == two else f"such as {two}, the same as {one}"
        count = "all" if len(shared) == looked else f"{len(shared)} of"
        logger.warning(
            "%s %d images of %s that were looked at are in %s too, %s: scores of %s are better than they should be",
            count, looked, second, first, how, second,
        )  # fmt: skip
    return total


def _spread(paths: list[str], count: int) -> list[str]:
    """At most so many paths, evenly spaced."""
    if len(paths) <= count:
        return paths
    return [paths[place] for place in np.linspace(0, len(paths) - 1, count).astype(int).tolist()]


def _size(path: str) -> int | None:
    """Bytes of a file; None where there is none, as for images inside archives."""
    try:
        return os.stat(path).st_size or None
    except OSError:
        return None


def _same_content(first: str, second: str) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)  # reads no further than to the first difference
    except OSError:
        return False
