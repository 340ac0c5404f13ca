"""Which backbone a file of weights holds, as options with which it is built and evaluated."""

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.config import Config, ConfigError, load_config, parse_config
from dinov2.layers.patch_embed import as_pair
from dinov2.models.build import ARCHITECTURES, student_options_of
from dinov2.models.layouts import RenamedState, extract_backbone
from dinov2.models.pretrained import explain_names, read_checkpoint
from dinov2.models.released import RELEASED_BACKBONES, fetch_weights, split_prefix

logger = logging.getLogger("dinov2")

EVALUATED_AT = 224  # pixels, where weights were made for larger images, as the released ones


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of names, kinds, shapes and values of all parameters and buffers, as 64 hexadecimal digits.

    Two networks have the same one if and only if their weights are equal, wherever they lie.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_of_weights(source: str | Path, content: Mapping[str, Any] | None = None) -> Config:
    """Options that describe the backbone that weights are of.

    Those in the file come first, then those of the released name, then the ``config.yaml`` in the folder of its run,
    of which ``eval/training_9`` is a part. Of any other file they are told from its parameters: all but the way of
    resizing position embeddings, which is that of the released backbones.

    Args:
        source: see `fetch_weights`.
        content: of the file, where it was read already.

    Raises:
        ConnectionError: a download failed.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no checkpoint, of no architecture that is known, or the state of a fine-tuning
            run.
    """
    address, prefix = split_prefix(source)
    if str(address) in RELEASED_BACKBONES and not Path(address).exists():
        return released_config(str(address))
    path = fetch_weights(source)
    if content is None:
        content = read_checkpoint(path)
    for key in ("config", "backbone_config"):  # of a teacher, and of a model with a head
        if key in content and not (key == "config" and "backbone_config" in content):
            return parse_config(content[key], f"{path}: {key}")
    if "step_id" in content and "options" in content:
        raise ValueError(
            f"{path} is the state of a fine-tuning run, from which it goes on; load the best.pth beside it, its model"
        )
    for folder in path.absolute().parents[:3]:
        if (folder / "config.yaml").is_file():
            try:
                return load_config(folder / "config.yaml")
            except ConfigError as error:  # such as that of a fine-tuning run
                logger.warning("%s does not describe the backbone in %s: %s", folder / "config.yaml", path, error)
    names: list[str] = []
    try:
        found = extract_backbone(content, prefix)
        names += [*(found.renamed.get(name, name) for name in found.tensors), *found.ignored]
        sections = _sections(found)
    except ValueError as error:
        raise ValueError(
            f"{path} does not say which backbone it holds, and there is no config.yaml beside it or in the folders "
            f"above; nor do its parameters: {error}. {explain_names(names)}Name the config.yaml of its run, or a "
            f"released backbone such as dinov2_vits14 that it has the shape of (config=, --config, "
            f"backbone.config_file=)"
        ) from error
    told = " ".join(f"student.{name}={value}" for name, value in sections["student"].items())
    logger.info("%s has no config; told from its parameters: %s", path, told)
    return load_config(sections)


def released_config(name: str) -> Config:
    """Options that describe a released backbone, and its evaluation at 224 pixels."""
    crops = {"global_crops_size": 518, "local_crops_size": 98}
    student = RELEASED_BACKBONES[name].student
    return load_config({"student": student, "crops": crops, "evaluation": {"image_size": EVALUATED_AT}})


def _sections(found: RenamedState) -> dict[str, dict[str, Any]]:
    tensors = found.tensors
    student = student_options_of(tensors)
    if student.get("arch") not in ARCHITECTURES:
        raise ValueError(f"they are of no known architecture {student.get('arch', '')}".rstrip())
    positions = tensors["pos_embed"].shape[1] if "pos_embed" in tensors and tensors["pos_embed"].ndim == 3 else 0
    if not positions:
        raise ValueError("they hold no learned position embedding, as those of networks with rotary positions (DINOv3)")
    patches = positions if found.lacks_class_position else positions - 1
    side = math.isqrt(max(patches, 0))
    if side == 0 or side**2 != patches:
        raise ValueError(
            f"their position embedding has {positions} entries, which are not those of a square of patches"
        )
    if student["num_register_tokens"]:  # as the released backbones with registers
        student |= {"interpolate_antialias": True, "interpolate_offset": 0.0}
    patch = as_pair(student["patch_size"])
    crops = [[side * length for length in patch] for side in (side, min(7, side))]
    sections = {"student": student, "crops": {"global_crops_size": crops[0], "local_crops_size": crops[1]}}
    if patch[0] == patch[1] and crops[0][0] > EVALUATED_AT:
        sections["evaluation"] = {"image_size": EVALUATED_AT // patch[0] * patch[0]}
    return sections
