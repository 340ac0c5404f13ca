"""What scores come from: fingerprints of datasets and weights, and the revision of the code."""

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.models.released import fetch_weights
from dinov2.utils.files import file_digest

CODE = ("dinov2", "configs")  # folders of the checkout that decide results
NOT_A_FILE = -1


def find_origins(datasets: Mapping[str, ImageDataset], weights: str) -> dict[str, Any]:
    """What scores come from, found out by the main process for all; every process must call it.

    Args:
        datasets: by role, such as ``train`` and ``val``; one set in two roles is read once.
        weights: their file; empty for random ones.

    Returns:
        ``datasets`` (fingerprints by role), ``weights`` and ``revision``, as results have them.
    """
    found = None
    if is_main_process():
        distinct = {id(dataset): dataset for dataset in datasets.values()}
        fingerprints = {key: dataset_fingerprint(dataset) for key, dataset in distinct.items()}
        found = {
            "datasets": {role: fingerprints[id(dataset)] for role, dataset in datasets.items()},
            "weights": weights_fingerprint(weights),
            "revision": git_revision(),
        }
    origins = all_gather_objects(found)[0]
    assert origins is not None
    return origins


def git_revision(root: str | Path | None = None) -> str:
    """Commit of the checkout that this package was imported from, ``+dirty`` after it when its code was changed.

    Args:
        root: folder of the checkout; by default the one that holds the package.

    Returns:
        The 40 hexadecimal digits; empty where the package is no part of a checkout of its own, or there is no git.
    """
    folder = Path(__file__).parents[2] if root is None else Path(root)
    # A package that is installed somewhere inside another project's checkout must not name that project's commit.
    if not (folder / ".git").exists():
        return ""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return ""
    return f"{commit}+dirty" if _git(folder, "status", "--porcelain", "--", *CODE) else commit


def dataset_fingerprint(dataset: ImageDataset) -> dict[str, Any]:
    """Describes a dataset so that two results can be seen to be about the same images.

    Returns:
        ``num_images``, ``num_parts``, ``num_labelled``, ``classes``, ``value_range`` and
        ``preprocessing`` where there were any, and the ``sha256`` over the sorted rows of path,
        label, part and, where images are plain files, size. Paths count from the folder that all images share, so the
        place of the set and the order of its images do not matter; the images' content is not read.
    """
    paths = [str(dataset.get_image_path(index)) for index in range(len(dataset))]
    groups = list(dataset.get_group_ids())
    labels = dataset.get_targets()
    try:
        shared = os.path.commonpath({os.path.dirname(path) for path in paths})
    except ValueError:  # no paths, or absolute and relative ones
        shared = ""
    start = len(os.path.join(shared, "")) if shared else 0
    digest = hashlib.sha256()
    rows = (
        f"{path[start:]}\0{label}\0{path[start:] if group == path else group}\0{_size(path)}\n"
        for path, label, group in zip(paths, labels.tolist(), groups, strict=True)
    )
    for row in sorted(rows):
        digest.update(row.encode("utf-8", "surrogateescape"))
    return {
        "num_images": len(paths),
        "num_parts": len(set(groups)),
        "num_labelled": int((labels != MISSING_TARGET).sum()),
        "classes": list(dataset.classes),
        **({} if dataset.value_range is None else {"value_range": dataset.value_range.ends}),
        **({"preprocessing": dataset.preprocessing.to_values()} if dataset.preprocessing.steps else {}),
        "sha256": digest.hexdigest(),
    }


def weights_fingerprint(path: str) -> dict[str, Any]:
    """Describes a file of weights.

    Args:
        path: of the file, its address, or the name of a released backbone; empty for random weights.

    Returns:
        ``path``, ``sha256`` and ``bytes``; for random weights ``{"path": "", "random": True}``, and the path alone
        where it names no file.
    """
    if not path:
        return {"path": "", "random": True}
    file = fetch_weights(path)
    if not file.is_file():
        return {"path": path}
    return {"path": path, "sha256": file_digest(file), "bytes": file.stat().st_size}


def _git(folder: Path, *words: str) -> str:
    """The output of git; empty when it fails or is not there."""
    # A hook that runs us names its own repository in the environment; these options come before that.
    place = (f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "--no-optional-locks")
    try:
        answer = subprocess.run(
            ["git", *place, *words], capture_output=True, text=True, timeout=60, check=False, cwd=folder
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return NOT_A_FILE
