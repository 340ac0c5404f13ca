"""The command ``dinov2 prune``: a backbone with fewer heads, hidden units or blocks, as a file that loads like any."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.config import Config, load_config, render_config
from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset
from dinov2.deploy.parity import open_set
from dinov2.eval.features import make_eval_transform
from dinov2.logging import logging_to
from dinov2.models.description import config_of_weights
from dinov2.models.pretrained import read_checkpoint
from dinov2.models.pruning import (
    CRITERIA,
    PARTS,
    BackboneSize,
    Costs,
    choose_size,
    count_flops,
    prune_backbone,
    score_by_activation,
    score_by_magnitude,
)
from dinov2.models.released import fetch_weights
from dinov2.predict.model import Model, load_model
from dinov2.tasks.task import spread_evenly
from dinov2.utils.files import write_text_atomically, write_with_checksum

logger = logging.getLogger("dinov2")

WEIGHTS, OPTIONS, REPORT = "teacher_checkpoint.pth", "config.yaml", "pruning.json"
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """How much of a backbone goes, and which.

    Attributes:
        flops: fraction of the floating-point operations that stays, in (0, 1).
        parts: what may go, among `PARTS`.
        by: one of `CRITERIA`.
        images: that activations are looked at on.
    """

    flops: float = 0.7
    parts: Sequence[str] = ("heads", "mlp")
    by: str = "activation"
    images: int = 256


def prune_model(
    source: str,
    output_dir: str | Path,
    settings: PruneSettings,
    *,
    on: str = "",
    config: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Writes a smaller backbone into a folder: weights, ``config.yaml`` and ``pruning.json``.

    The file of weights is a teacher's, with the heads of pretraining if there were any: it describes itself, so that
    evaluators, fine-tuning, `dinov2.load` and export take it as they take any. ``config.yaml`` describes it too, as
    options of a run that goes on from it in the folder ``recovered``, with what was pruned as the frozen teacher if
    that had heads.

    Args:
        source: file, address or released name of a backbone; of a model with a head the backbone alone.
        output_dir: folder, made if need be; it must hold none of the three yet.
        settings: what goes.
        on: dataset string of images of the backbone's own.
        config: options that describe the backbone; None for what its file says.
        device: where images are looked at.

    Returns:
        What ``pruning.json`` holds.

    Raises:
        ValueError: settings are out of range, or need images that are not named; or see `load_model`.
        FileNotFoundError, ConnectionError: there is no such file.
        FileExistsError: the folder holds one of the three already.
        OSError: it cannot be written.
    """
    if settings.by not in CRITERIA:
        raise ValueError(f"by={settings.by!r} is unknown; allowed: {', '.join(CRITERIA)}")
    needs_images = settings.by == "activation" or "depth" in settings.parts
    if needs_images and not on:
        raise ValueError(
            "--on is needed: what heads and units add, and which blocks change features least, is seen on images; "
            "--by magnitude without depth goes by weights alone"
        )
    if needs_images and settings.images < 1:
        raise ValueError(f"--images must be at least 1, found {settings.images}")
    idle = {"--on": on, "--images": settings.images != PruneSettings().images}
    if not needs_images and any(idle.values()):
        shown = " and ".join(name for name, is_named in idle.items() if is_named)
        logger.warning("without effect, as heads and units are scored by their weights: %s", shown)
    folder = Path(output_dir)
    for name in (WEIGHTS, OPTIONS, REPORT):  # a config.yaml may be that of a run
        if (folder / name).exists():
            raise FileExistsError(f"{folder} holds {name} already; name another folder, or delete it")
    model = load_model(source, config, device)
    backbone = model.backbone
    costs, size = Costs.of(backbone, model.image_size), BackboneSize.of(backbone)
    target = choose_size(costs, size, settings.parts, settings.flops)
    scores = score_by_magnitude(backbone)
    if needs_images:
        seen = score_by_activation(backbone, _batches(model, open_set(on, model), settings.images))
        scores = seen if settings.by == "activation" else replace(scores, blocks=seen.blocks)
    content = read_checkpoint(fetch_weights(source))
    described = config_of_weights(source, content) if config is None else load_config(config)
    pruned, student, kept = prune_backbone(backbone, described.student, target, scores)

    heads = _heads(content)
    described = replace(described, student=replace(student, pretrained_weights="", pretrained_heads=False))
    written = folder / WEIGHTS
    before, after = (count_flops(network, model.image_size) for network in (backbone, pruned))
    report = {
        "pruned": source,
        "by": settings.by,
        "parts": list(settings.parts),
        "on": on if needs_images else "",
        "image_size": list(model.image_size),
        "flops": {"before": before, "after": after, "fraction": after / before},
        "parameters": {
            name: sum(entry.numel() for entry in network.parameters())
            for name, network in (("before", backbone), ("after", pruned))
        },
        "size": {"before": vars(size), "after": vars(target)},
        "blocks_kept": [entry.index for entry in kept],
        "heads_kept": [entry.heads.tolist() for entry in kept],
        "block_changes": scores.blocks,
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{name}": tensor.cpu() for name, tensor in pruned.state_dict().items()}
    file = {"teacher": {**state, **heads}, "config": render_config(described), **_prepared(model)}
    write_with_checksum(written, lambda opened: torch.save(file, opened))
    going_on = _going_on(described, source, "" if config is None else str(config), folder, has_heads=bool(heads))
    write_text_atomically(folder / OPTIONS, render_config(going_on))
    write_text_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _heads(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The heads of pretraining beside a teacher's backbone, which fit the smaller one too: its tokens are as wide."""
    teacher = content.get("teacher")
    if not isinstance(teacher, Mapping):
        return {}
    return {name: tensor for name, tensor in teacher.items() if name.startswith(("dino_head.", "ibot_head."))}


def _prepared(model: Model) -> dict[str, Any]:
    """How images were prepared, as a teacher's file says it."""
    content: dict[str, Any] = {}
    if model.value_range is not None:
        content["value_range"] = model.value_range.ends
    if model.light != "original":
        content["light"] = model.light
    if model.preprocessing.steps:
        content["preprocessing"] = model.preprocessing.to_values()
    return content


def _going_on(config: Config, source: str, source_config: str, folder: Path, *, has_heads: bool) -> Config:
    """Options of a run that goes on from the smaller network."""
    teacher = (source, source_config) if has_heads else ("", "")
    return replace(
        config,
        MODEL=replace(config.MODEL, WEIGHTS=""),
        train=replace(config.train, output_dir=str(folder / "recovered"), resume=False, resume_path=""),
        student=replace(config.student, pretrained_weights=str(folder / WEIGHTS), pretrained_heads=has_heads),
        distillation=replace(config.distillation, teacher_weights=teacher[0], teacher_config=teacher[1]),
    )


def _batches(model: Model, dataset: ImageDataset, count: int) -> Iterator[Tensor]:
    """Images that are evenly spread over a set, as the model sees them."""
    transform = make_eval_transform(model.image_size, whole_image=model.whole_image)
    indices = spread_evenly(range(len(dataset)), count)
    for start in range(0, len(indices), _BATCH):
        yield torch.stack([transform(dataset.get_image(index)) for index in indices[start : start + _BATCH]])


@dataclass(frozen=True)
class PruneOptions:
    """Options of the command."""

    model: str = option(help="backbone: file, address or released name", positional=True)
    output_dir: Path = option(help="new folder for the weights, config.yaml and pruning.json")
    flops: float = option(0.7, help="fraction of the floating-point operations that stays")
    parts: tuple[str, ...] = option(("heads", "mlp"), help="what may go", choices=PARTS)
    by: str = option("activation", help="what tells the best heads and units", choices=CRITERIA)
    on: str = option("", help="dataset string of images like those of training")
    images: int = option(256, help="images that activations are looked at on")
    config: Path | None = option(None, help="YAML that describes the backbone; none: as its file says")
    device: str = option("auto", help="where it is computed", choices=("auto", "cpu", "cuda", "mps"))


def main(argv: Sequence[str] | None = None) -> int:
    """Prunes and says what was written; returns the exit code."""
    options = parse(
        PruneOptions,
        argv,
        description="Writes a backbone with fewer heads, hidden units or blocks, which loads like any other.",
        example="python tools/prune_backbone.py outputs/vits14/eval/training_11249/teacher_checkpoint.pth --flops 0.7 "
        "--on GroupedJSON:split=TRAIN:root=/data/parts --output-dir outputs/pruned",
    )
    settings = PruneSettings(flops=options.flops, parts=options.parts, by=options.by, images=options.images)
    with logging_to(None):
        report = prune_model(
            options.model,
            options.output_dir,
            settings,
            on=options.on,
            config=options.config,
            device=options.device,
        )
    sizes = [
        f"{size['depth']} blocks of {size['num_heads']} heads and {size['hidden_dim']} hidden units"
        for size in report["size"].values()
    ]
    sys.stdout.write(
        f"{options.output_dir / WEIGHTS}: {report['flops']['fraction']:.1%} of the FLOPs at "
        f"{' x '.join(map(str, report['image_size']))} pixels; {sizes[0]} became {sizes[1]}\n"
        f"a short training can win back what was lost, such as\n  python run/train/train.py --config "
        f"{options.output_dir / OPTIONS} optim.epochs=4\n"
    )
    return 0


if __name__ == "__main__":
    run_as("prune")
