"""Loading a backbone from a file, with a report of what happened to every parameter."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dinov2.layers.patch_embed import interpolate_position_embedding
from dinov2.models.released import fetch_weights
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import shown_fault, sidecar
from dinov2.utils.param_groups import strip_wrappers

logger = logging.getLogger("dinov2")

# The teacher comes first: it is what evaluation uses and what is released.
CONTAINERS = ("teacher", "student", "model", "state_dict", "backbone")
BACKBONE_PREFIXES = ("teacher.backbone.", "teacher.", "student.backbone.", "student.", "backbone.")

MAX_LISTED = 8

_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")


@dataclass(frozen=True, kw_only=True)
class RenamedState:
    """A state dict under our names.

    Attributes:
        tensors: our name -> tensor.
        renamed: our name -> full name in the checkpoint, where the two differ.
        ignored: full names in the checkpoint that belong to something else, such as heads or the other network.
    """

    tensors: dict[str, Tensor]
    renamed: dict[str, str]
    ignored: tuple[str, ...]


def unchunk_block_name(name: str) -> str:
    """Renames ``blocks.<chunk>.<index>.…`` to ``blocks.<index>.…``; other names stay as they are."""
    return _CHUNKED_BLOCK.sub("blocks.", name)


def extract_backbone(checkpoint: Mapping[str, Any]) -> RenamedState:
    """Picks the backbone out of a checkpoint and renames its parameters.

    Understood are a bare state dict; one nested under any of `CONTAINERS`, also several deep; and flat names that start
    with any of `BACKBONE_PREFIXES`. Where a teacher and a student are present, the teacher is taken.

    Raises:
        ValueError: when there is no tensor in it, or two parameters end up with one name.
    """
    flat = _flatten(checkpoint)
    if not flat:
        keys = ", ".join(map(str, list(checkpoint)[:8])) or "none"
        raise ValueError(f"no parameter tensors in the checkpoint; its top-level keys: {keys}")
    stripped = {name: strip_wrappers(name) for name in flat}
    prefix = next(
        (prefix for prefix in BACKBONE_PREFIXES if any(name.startswith(prefix) for name in stripped.values())), ""
    )
    chosen = {name: tensor for name, tensor in flat.items() if stripped[name].startswith(prefix)}

    tensors: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    for name, tensor in chosen.items():
        ours = unchunk_block_name(stripped[name].removeprefix(prefix))
        if ours in tensors:
            raise ValueError(
                f"two parameters of the checkpoint end up as {ours!r}: {renamed.get(ours, ours)!r}, {name!r}"
            )
        tensors[ours] = tensor
        if ours != name:
            renamed[ours] = name
    return RenamedState(tensors=tensors, renamed=renamed, ignored=tuple(name for name in flat if name not in chosen))


def _flatten(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Collects tensors under dotted names, descending into the containers only (not into an optimizer's state)."""
    flat: dict[str, Tensor] = {}
    for key, value in mapping.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping) and key in CONTAINERS:
            # "model" and "state_dict" are mere wrapping; the others say which network it is.
            flat |= _flatten(value, prefix if key in ("model", "state_dict") else f"{prefix}{key}.")
    return flat


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of the parameters of a model and of a file.

    Attributes:
        path: the file.
        loaded: parameters of the model that were filled, resized ones included.
        resized: parameter -> its shape in the file and its shape now.
        renamed: parameter -> its name in the file, where the two differ.
        missing: parameters of the model that the file does not have; they keep their values.
        unexpected: backbone parameters of the file that the model does not have.
        ignored: tensors of the file that belong to another network or a head.
    """

    path: Path
    loaded: tuple[str, ...]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    renamed: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]

    def summary(self) -> str:
        """The report in a few lines for people."""
        total = len(self.loaded) + len(self.missing)
        lines = [f"loaded {len(self.loaded)} of {total} backbone parameters from {self.path}"]
        for name, (before, after) in self.resized.items():
            lines.append(f"  resized {name}: {list(before)} -> {list(after)}")
        if self.renamed:
            ours, theirs = next(iter(self.renamed.items()))
            lines.append(f"  renamed {len(self.renamed)}, e.g. {theirs} -> {ours}")
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected), ("ignored", self.ignored)):
            if names:
                lines.append(f"  {label} {len(names)}: {listing(names)}")
        return "\n".join(lines)


def load_pretrained_backbone(
    model: DinoVisionTransformer,
    source: str | Path,
    *,
    min_fraction: float = 0.5,
    log: bool = True,
    source_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Fills a backbone from a released file, a teacher checkpoint, or any layout of `extract_backbone`.

    A position embedding of another grid is resampled bicubically in float32 with the model's own antialias and offset:
    at its own image size the model then computes what a model of the file's size would compute there. The model is
    changed only when everything fits.

    Args:
        model: the backbone to fill, on any device and in any dtype; not sharded yet. On the meta device, where there is
            nothing to fill, the file is checked all the same.
        source: a file, an address, or the name of a released backbone; see `fetch_weights`.
        min_fraction: share of the model's parameter tensors that must be in the file, in [0, 1].
        log: whether the report is logged, as a warning when parameters are missing or unexpected.
        source_grid: patches (height, width) of the file's position embedding. By default the model's grid where the
            number of patches agrees, and a square otherwise.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when the file does not exist.
        ValueError: when it is not a checkpoint or truncated, when shapes belong to another architecture, or when fewer
            than ``min_fraction`` of the parameters are in it.
    """
    path = fetch_weights(source)
    checkpoint = read_checkpoint(path)
    try:
        found = extract_backbone(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = model.state_dict()
    tensors = dict(found.tensors)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if "pos_embed" in tensors:
        before = tensors["pos_embed"]
        tensors["pos_embed"] = _fit_position_embedding(model, before, path, source_grid)
        if tensors["pos_embed"] is not before:
            resized["pos_embed"] = (tuple(before.shape), tuple(tensors["pos_embed"].shape))

    loaded = tuple(name for name in expected if name in tensors)
    report = LoadReport(
        path=path,
        loaded=loaded,
        resized=resized,
        renamed={name: found.renamed[name] for name in loaded if name in found.renamed},
        missing=tuple(name for name in expected if name not in tensors),
        unexpected=tuple(found.renamed.get(name, name) for name in tensors if name not in expected),
        ignored=found.ignored,
    )
    if len(loaded) < min_fraction * len(expected):
        raise ValueError(
            f"{path} fills only {len(loaded)} of the {len(expected)} parameters of the backbone (at least "
            f"{min_fraction:.0%} are needed). Found: {listing(report.unexpected + report.ignored) or 'nothing else'}. "
            f"Expected names such as: {listing(expected)}"
        )
    wrong = [
        f"{name} {list(tensors[name].shape)} in the file, {list(expected[name].shape)} in the model"
        for name in loaded
        if tensors[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"{path} holds another architecture; {len(wrong)} shapes differ: {listing(wrong, '; ')}")
    if not model.pos_embed.is_meta:
        model.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    if log:
        incomplete = bool(report.missing or report.unexpected)
        logger.log(logging.WARNING if incomplete else logging.INFO, report.summary())
        if "register_tokens" in report.missing:
            logger.warning("the model has register tokens and %s has none: they start untrained", path)
        if any(name.endswith("register_tokens") for name in report.unexpected):
            logger.warning("%s has register tokens and the model has none: features will differ", path)
    return report


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Reads a checkpoint onto the CPU; nothing in it can run code.

    Of a ``.safetensors`` file, the options of its run come along as ``config``, where it has them.

    A file that has its SHA-256 beside it (``weights.pth.sha256``), as those of runs have, is verified first.

    Raises:
        FileNotFoundError: when the file does not exist.
        ValueError: when it is damaged or no checkpoint, holds no mapping, or is one rank's part of a sharded run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; name a file in it, such as best.pth or eval/training_299/teacher_checkpoint.pth"
        )
    if fault := shown_fault(path):
        raise ValueError(
            f"{path} {fault}. Nothing of it is loaded; take another copy of it, or delete {sidecar(path).name} if that "
            f"belongs to another file"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                options = {key: text for key, text in (file.metadata() or {}).items() if key == "config"}
                return {name: file.get_tensor(name) for name in file.keys()} | options  # noqa: SIM118  # no mapping
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise almost anything
        size = f"{path.stat().st_size} bytes"
        raise ValueError(
            f"{path} ({size}) cannot be read as a checkpoint: it is truncated, not written by torch.save, or "
            f"holds objects other than tensors and plain values ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a mapping of names to tensors")
    if checkpoint.get("world_size", 1) != 1:
        raise ValueError(
            f"{path} is one of {checkpoint['world_size']} rank files of a training run and holds parts of tensors: "
            f"give the run's eval/training_*/teacher_checkpoint.pth instead"
        )
    return checkpoint


def _fit_position_embedding(
    model: DinoVisionTransformer, pos_embed: Tensor, path: Path, source_grid: tuple[int, int] | None
) -> Tensor:
    """Resamples to the model's grid; another layout or width is passed on for the shape check to report."""
    if pos_embed.ndim != 3 or pos_embed.shape[-1] != model.embed_dim:
        return pos_embed
    num_patches = pos_embed.shape[1] - 1
    if source_grid is None:
        side = math.isqrt(max(num_patches, 0))
        same_count = pos_embed.shape == model.pos_embed.shape
        source_grid = model.grid_size if same_count else (side, side)
    if source_grid[0] * source_grid[1] != num_patches:
        raise ValueError(
            f"{path}: the position embedding has {num_patches} patches, which is not a grid of {source_grid[0]} x "
            f"{source_grid[1]}; pass the (height, width) of its grid as source_grid"
        )
    return interpolate_position_embedding(
        pos_embed,
        source_grid,
        model.grid_size,
        antialias=model.interpolate_antialias,
        offset=model.interpolate_offset,
    )


def listing(names: Iterable[str], separator: str = ", ") -> str:
    """The first `MAX_LISTED` names, and how many more there are."""
    names = list(names)
    more = len(names) - MAX_LISTED
    return separator.join(names[:MAX_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")
