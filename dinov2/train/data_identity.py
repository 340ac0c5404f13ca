"""What the order of a run's data hangs on, kept in checkpoints and compared on resuming."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from dinov2.config import Config
from dinov2.data.pretraining import ImageSource
from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

MAX_NAMES = 65536  # evenly spread over larger sets: one image more or less moves most of them


def data_identity(config: Config, images: ImageSource) -> dict[str, str]:
    """The seed, the sampler, and number and names of the images; the folder that they lie in may change."""
    return {
        "train.seed": str(config.train.seed),
        "train.sampler_type": config.train.sampler_type,
        "dataset": f"{len(images)} images, names {_digest(images)}",
    }


def warn_of_other_data(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Says loudly what differs from the run that wrote the checkpoint."""
    changes = [f"{name} was {saved[name]} and is {now[name]}" for name in saved if saved[name] != now.get(name)]
    if changes and is_main_process():
        logger.warning(
            "THE ORDER OF THE DATA CHANGES from here on: %s. The position in the stream is kept, but images may come "
            "again or be left out in this pass",
            "; ".join(changes),
        )


def _digest(images: ImageSource) -> str:
    stride = -(-len(images) // MAX_NAMES)
    digest = hashlib.sha256()
    for index in range(0, len(images), stride):
        path = Path(images.get_image_path(index))
        digest.update(f"{path.parent.name}/{path.name}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
