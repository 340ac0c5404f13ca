"""The folder of a run: made before anything is computed, since nothing is worth computing that cannot be kept."""

import os
import tempfile
from pathlib import Path

from dinov2.distributed import barrier


def prepare_run_folder(folder: str | Path) -> Path:
    """Makes the folder that ``train.output_dir`` names, on all processes together.

    Raises:
        OSError: when it cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"the run's folder {folder} (train.output_dir) cannot be written: {error}") from error
    barrier()
    return folder


def check_run_folder(folder: str | Path) -> None:
    """Whether `prepare_run_folder` would succeed, as far as that can be told without leaving a trace.

    Raises:
        OSError: when the folder, or the nearest one above it that exists, cannot be written.
    """
    folder = Path(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        cause = "cannot be written" if existing.is_dir() else "is not a folder"
        raise OSError(f"the run's folder {folder} (train.output_dir) cannot be written: {existing} {cause}")
