"""Distillation: a larger, frozen network gives the targets that a smaller student learns by pretraining's losses."""

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from dinov2.config import Config, as_pair, load_config
from dinov2.models.build import build_backbone
from dinov2.models.description import config_of_weights
from dinov2.models.pretrained import load_pretrained_backbone, read_checkpoint
from dinov2.models.released import fetch_weights
from dinov2.train.ssl_meta_arch import has_separate_head, load_heads, make_network

logger = logging.getLogger("dinov2")

_WEIGHTS = "distillation.teacher_weights"


def load_frozen_teacher(config: Config, *, log: bool) -> nn.ModuleDict | None:
    """The network of ``distillation.teacher_weights``, backbone and heads; None where the option is empty.

    Its prototypes are what the student learns to predict, so both have as many, and patches of the same size.

    Args:
        config: options of the run.
        log: whether it is told what became of each parameter.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: the file is missing, damaged, does not fit the options, or holds
            a backbone alone.
    """
    source = config.distillation.teacher_weights
    if not source:
        return None
    path = fetch_weights(source)
    if not path.exists():
        raise FileNotFoundError(f"{_WEIGHTS}={source} does not exist")
    content = read_checkpoint(path)
    described = config.distillation.teacher_config
    theirs = load_config(described) if described else config_of_weights(source, content)
    _check_fit(config, theirs, source)
    size = as_pair(theirs.crops.global_crops_size)
    # Heads as theirs, those that the losses of this run need.
    options = replace(
        theirs,
        dino=replace(theirs.dino, loss_weight=config.dino.loss_weight),
        ibot=replace(theirs.ibot, loss_weight=config.ibot.loss_weight),
    )
    network = make_network(options, build_backbone(theirs.student, img_size=size, drop_path_rate=0.0))
    load_pretrained_backbone(network["backbone"], source, log=log)  # type: ignore[arg-type]
    load_heads(
        network,
        content,
        f"{_WEIGHTS}={source}",
        missing="without heads a network gives no targets",
        different="name the config.yaml of its run in distillation.teacher_config",
    )
    if log:
        logger.info("targets come from the frozen %s in %s", theirs.student.arch, source)
    return network


def _check_fit(ours: Config, theirs: Config, source: str) -> None:
    facts: list[tuple[str, Any, Any]] = [
        ("student.patch_size", as_pair(ours.student.patch_size), as_pair(theirs.student.patch_size)),
        ("student.in_channels", ours.student.in_channels, theirs.student.in_channels),  # both see the same crops
        ("ibot.separate_head", ours.ibot.separate_head, theirs.ibot.separate_head),
        ("dino.head_n_prototypes", ours.dino.head_n_prototypes, theirs.dino.head_n_prototypes),
    ]
    if has_separate_head(ours):
        facts.append(("ibot.head_n_prototypes", ours.ibot.head_n_prototypes, theirs.ibot.head_n_prototypes))
    for name, own, other in facts:
        if own != other:
            shown = str(other).lower() if isinstance(other, bool) else other
            raise ValueError(f"{name}={own} of the student is {shown} in {_WEIGHTS}={source}: set {name}={shown}")
