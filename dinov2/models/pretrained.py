"""Loading a backbone from a file, with one check of what may be missing or left over, and a report.

A backbone that is filled computes what the network in the file computed, or it is not filled: what would silently
change its features is refused by name.
"""

import json
import logging
import math
import re
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dinov2.layers.block import LAYER_NORM_EPS
from dinov2.layers.patch_embed import adapt_input_channels, interpolate_position_embedding
from dinov2.models.build import student_options_of
from dinov2.models.layouts import RenamedState, extract_backbone, listing
from dinov2.models.released import fetch_weights, file_kind, split_prefix
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import shown_fault, sidecar

logger = logging.getLogger("dinov2")

_MAX_EXAMPLES = 3  # of parameters that do not fit
_PATCHES, _RGB = "patch_embed.proj.weight", 3
MIN_FRACTION = 0.5  # of the parameters of a backbone; a file with less is of something else
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Parameters that a whole file may lack, since there is a value with which the backbone computes what the file's network
# did: the value, and the option that leaves them out. None keeps the value: the mask token is used by pretraining only.
_HARMLESS: tuple[tuple[re.Pattern[str], float | None, str], ...] = (
    (re.compile(r"mask_token"), None, ""),
    (re.compile(r"blocks\.\d+\.ls[12]\.gamma"), 1.0, "layerscale=0"),
    (re.compile(r"blocks\.\d+\.attn\.qkv\.bias"), 0.0, "qkv_bias=false"),
    (re.compile(r"blocks\.\d+\.attn\.proj\.bias"), 0.0, "proj_bias=false"),
    (re.compile(r"blocks\.\d+\.mlp\.\w+\.bias"), 0.0, "ffn_bias=false"),
)
_NEUTRAL_NAMES = {
    "layerscale=0": "LayerScale, so its gains are 1 here",
    "qkv_bias=false": "biases of queries, keys and values, so these are 0 here",
    "proj_bias=false": "biases of the attention's output, so these are 0 here",
    "ffn_bias=false": "biases of the feed-forward layers, so these are 0 here",
}
# What the names of other networks mean.
_FOREIGN = (
    (r"rope|periods|freqs", "rotary positions, as in DINOv3 and EVA"),
    (r"storage_tokens|bias_mask|embeddings\.patch_embeddings\.weight", "DINOv3"),
    (r"norm_pre|ln_pre|pre_layrnorm", "a norm before the first block, as in CLIP"),
    (r"[qk]_norm", "norms of queries and keys"),
    (r"relative_position|rel_pos|q_bias|v_bias", "relative positions, as in BEiT"),
    (r"dist_token", "a distillation token, as in DeiT"),
    (r"fc_norm", "a norm after pooling instead of the final norm"),
    (r"layers\.\d+\.(blocks|downsample)", "a hierarchical network, as Swin"),
    (r"layer\d\.\d+\.(conv|bn)", "a ResNet"),
    (r"scale_inv|weight_scale|absmax|zero_point|SCB|quant_", "quantised weights: give the file before quantisation"),
    (
        r"(?m)^centres$",
        "a memory of good parts without its network: eval/anomaly.py takes it (--memory), and the best.pth of a "
        "fine-tuning run predicts",
    ),
    (r"lora_[AB]|lora\.", "low-rank additions that were not merged into the weights"),
)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of the parameters of a model and of a file.

    Attributes:
        path: the file.
        loaded: parameters of the model that were filled, resized ones included.
        resized: parameter -> its shape in the file and its shape now.
        renamed: parameter -> its name in the file, where the two differ.
        missing: parameters of the model that the file does not have and that do not matter.
        unexpected: backbone parameters of the file that the model does not have; such a file is refused.
        ignored: tensors of the file that belong to another network or a head.
        neutral: option without which the model would not have them -> those missing that were set to a value with which
            the model computes the same as without them.
        prefix: what stood before the names of the backbone's parameters in the file.
    """

    path: Path
    loaded: tuple[str, ...]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    renamed: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    neutral: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prefix: str = ""

    def summary(self) -> str:
        """The report in a few lines for people."""
        total = len(self.loaded) + len(self.missing)
        lines = [
            f"Loaded pretrained weights from {self.path}: {len(self.loaded)} of {total} parameters of the backbone"
        ]
        for name, (before, after) in self.resized.items():
            lines.append(f"  resized {name}: {list(before)} -> {list(after)}")
        if self.renamed:
            ours, theirs = next(iter(self.renamed.items()))
            lines.append(f"  renamed {len(self.renamed)}, e.g. {theirs} -> {ours}")
        if "student" in self.prefix.lower():
            lines.append(f"  taken from {self.prefix.rstrip('.')}: the file holds no teacher")
        for option, names in self.neutral.items():
            lines.append(
                f"  the file has no {_NEUTRAL_NAMES[option]} ({len(names)} parameters): the backbone computes "
                f"the same; student.{option} leaves them out"
            )
        told = {name for names in self.neutral.values() for name in names}
        missing = tuple(name for name in self.missing if name not in told)
        for label, names in (("missing", missing), ("unexpected", self.unexpected), ("ignored", self.ignored)):
            if names:
                lines.append(f"  {label} {len(names)}: {listing(names)}")
        return "\n".join(lines)


def load_pretrained_backbone(
    model: DinoVisionTransformer,
    source: str | Path,
    *,
    log: bool = True,
    source_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Fills a backbone from a released file, a teacher checkpoint, or any layout of `extract_backbone`.

    This is the one check for all doors: parameters may be missing only where that is harmless (the mask token; or
    LayerScale or biases that no block of the file has, which are set to 1 and 0), and what the file has beyond the
    backbone's parameters must not change what it computes. A position embedding of another grid is resampled
    bicubically in float32 with the model's own antialias and offset: at its own image size the model then computes what
    a model of the file's size would compute there. A patch embedding of RGB is adapted to a model of other channels
    (see `adapt_input_channels`). The model is changed only when everything fits.

    Args:
        model: the backbone to fill, on any device and in any dtype; not sharded yet. On the meta device, where there is
            nothing to fill, the file is checked all the same.
        source: a file, an address, or the name of a released backbone; see `fetch_weights`. ``:prefix=NAME`` at its end
            says what stands before the names of the backbone's parameters, where that is not found.
        log: whether the report is logged, as a warning when parameters were set to neutral values or adapted to other
            channels.
        source_grid: patches (height, width) of the file's position embedding. By default the model's grid where the
            number of patches agrees, and a square otherwise.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when the file does not exist.
        ValueError: when it is not a checkpoint or truncated, quantised, holds NaN or infinity, or is of another network
            or architecture; the options that fit it are named as far as its parameters tell.
    """
    path, (_, prefix) = fetch_weights(source), split_prefix(source)
    checkpoint, expected = read_checkpoint(path), model.state_dict()
    try:
        found = extract_backbone(checkpoint, prefix)
        shared = [name for name in expected if name in found.tensors]
        _check_values({found.renamed.get(name, name): found.tensors[name] for name in shared})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if found.layout == "Hugging Face":
        _check_hugging_face_config(path.parent / "config.json", model)
    tensors = dict(found.tensors)
    if "mask_token" in tensors and tensors["mask_token"].shape != expected["mask_token"].shape:
        del tensors["mask_token"]  # of a decoder
    missing = tuple(name for name in expected if name not in tensors)
    unexpected = tuple(found.renamed.get(name, name) for name in tensors if name not in expected)
    if len(expected) - len(missing) < MIN_FRACTION * len(expected):
        raise ValueError(
            f"{path} fills only {len(expected) - len(missing)} of the {len(expected)} parameters of the backbone (at "
            f"least {MIN_FRACTION:.0%} are needed). Found: {listing(unexpected + found.ignored) or 'nothing else'}. "
            f"Expected names such as: {listing(expected)}. {explain_names(unexpected + found.ignored)}If the names "
            f"have something else before them, say so: FILE:prefix=NAME"
        )
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if "pos_embed" in tensors:
        tensors["pos_embed"], resampled = _fit_position_embedding(model, found, path, source_grid)
        if resampled:
            resized["pos_embed"] = (tuple(found.tensors["pos_embed"].shape), tuple(tensors["pos_embed"].shape))
    patches, wanted = tensors.get(_PATCHES), expected[_PATCHES].shape
    if patches is not None and patches.ndim == 4 and patches.shape[1] == _RGB != wanted[1]:
        tensors[_PATCHES] = adapt_input_channels(patches, wanted[1])
        resized[_PATCHES] = (tuple(patches.shape), tuple(tensors[_PATCHES].shape))
    neutral = _neutral_values(expected, missing)
    _check_fit(path, expected, tensors, [name for name in missing if name not in neutral], unexpected)

    loaded = tuple(name for name in expected if name in tensors)
    by_option: dict[str, tuple[str, ...]] = {}
    for name, (value, option) in neutral.items():
        if value is not None:
            by_option[option] = (*by_option.get(option, ()), name)
    report = LoadReport(
        path=path,
        loaded=loaded,
        resized=resized,
        renamed={name: found.renamed[name] for name in loaded if name in found.renamed},
        missing=missing,
        unexpected=unexpected,
        ignored=found.ignored,
        neutral=by_option,
        prefix=found.prefix,
    )
    if not model.pos_embed.is_meta:
        filled = {name: tensors[name] for name in loaded}
        for name, (value, _) in neutral.items():
            if value is not None:
                filled[name] = torch.full_like(expected[name], value)
        model.load_state_dict(filled, strict=False)
    if log:
        logger.log(logging.WARNING if by_option or _PATCHES in resized else logging.INFO, report.summary())
    return report


def _neutral_values(expected: Mapping[str, Tensor], missing: tuple[str, ...]) -> dict[str, tuple[float | None, str]]:
    """Values for parameters that may be missing, and the option that leaves these out; see `_HARMLESS`."""
    neutral: dict[str, tuple[float | None, str]] = {}
    for pattern, value, option in _HARMLESS:
        kind = [name for name in expected if pattern.fullmatch(name)]
        if all(name in missing for name in kind):
            neutral |= dict.fromkeys(kind, (value, option))
    return neutral


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raises a ValueError that names parameters of the backbone which are no plain finite numbers."""
    other = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if other:
        raise ValueError(
            f"{len(other)} parameters are no floating-point numbers of 16 bits or more, as in a quantised file: "
            f"{listing(other)}; give the file before quantisation"
        )
    bad = []
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            bad.append(f"{kind} in {name}")
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(tensors)} parameters hold NaN or infinity, so the training that wrote it had "
            f"broken down: {listing(bad)}; take an earlier file"
        )


def _check_hugging_face_config(path: Path, model: DinoVisionTransformer) -> None:
    """Compares what names and shapes of parameters do not tell with the ``config.json`` beside them."""
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    kinds = ("dinov2", "dinov2_with_registers", "vit", "vit_mae")
    facts = (
        ("model_type", kinds, config.get("model_type") in kinds),
        ("num_attention_heads", model.num_heads, config.get("num_attention_heads") == model.num_heads),
        ("hidden_act", "gelu", config.get("hidden_act") == "gelu"),
    )
    for name, wanted, fits in facts:
        if name in config and not fits:
            raise ValueError(f"{path}: {name}={config[name]}, and the backbone that the options describe has {wanted}")
    eps = config.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps > 2 * LAYER_NORM_EPS:  # a smaller one is lost in the variance of any token
        raise ValueError(f"{path}: layer_norm_eps={eps}, and norms of the backbone here add {LAYER_NORM_EPS:g}")


def _check_fit(
    path: Path,
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    missing: list[str],
    unexpected: tuple[str, ...],
) -> None:
    """Raises a ValueError when the backbone would not compute what the file's network computed."""
    faults = []
    wrong = [
        f"{name} {list(tensors[name].shape)} in the file, {list(shape)} in the model"
        for name, shape in ((name, tensor.shape) for name, tensor in expected.items())
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        faults.append(f"{len(wrong)} shapes differ: {listing(wrong, '; ', _MAX_EXAMPLES)}")
    if missing:
        names = listing(missing, most=_MAX_EXAMPLES)
        faults.append(f"it lacks {len(missing)} parameters that the backbone needs: {names}")
    if unexpected:
        names = listing(unexpected, most=_MAX_EXAMPLES)
        faults.append(f"{len(unexpected)} of its parameters have no place in the backbone: {names}")
    if not faults:
        return
    ours, theirs = student_options_of(expected), student_options_of(tensors)
    differing = [
        f"student.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in theirs.items()
        if (bool(value) != bool(ours[name]) if name == "layerscale" else value != ours.get(name, value))
    ]
    if "pos_embed" in missing:
        faults.append("a network without a learned position embedding has rotary or other positions, as DINOv3")
    advice = f"options that fit it: {' '.join(differing)}. Found: " if differing else ""
    raise ValueError(
        f"{path} holds another architecture; {advice}{'; '.join(faults)}. {explain_names(unexpected)}".rstrip(". ")
    )


def explain_names(names: Iterable[str]) -> str:
    """What the names of a file's parameters say about the network; empty when nothing is known about them."""
    joined = "\n".join(names)
    meanings = [meaning for pattern, meaning in _FOREIGN if re.search(pattern, joined)]
    return f"Such names stand for {'; '.join(meanings)}. " if meanings else ""


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Reads a checkpoint onto the CPU; nothing in it can run code.

    Of a ``.safetensors`` file, the options of its run come along as ``config``, where it has them. An index of several
    files, ``….safetensors.index.json`` or ``….bin.index.json``, stands for all of them.

    A file that has its SHA-256 beside it (``weights.pth.sha256``), as those of runs have, is verified first.

    Raises:
        FileNotFoundError: when the file does not exist.
        ValueError: when it is damaged or no checkpoint, holds no mapping, or is one rank's part of a sharded run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}{_newest_teacher(path, '; the newest teacher of that run is ')}"
        )
    if path.is_dir():
        example = _newest_teacher(path) or "best.pth or eval/training_299/teacher_checkpoint.pth"
        raise ValueError(f"{path} is a folder; name a file in it, such as {example}")
    if fault := shown_fault(path):
        raise ValueError(
            f"{path} {fault}. Nothing of it is loaded; take another copy of it, or delete {sidecar(path).name} if that "
            f"belongs to another file"
        )
    if path.name.endswith(".index.json"):
        return dict(entry for shard in _shards(path) for entry in read_checkpoint(shard).items())
    try:
        if _is_safetensors(path):
            with safe_open(path, "pt") as file:
                options = {key: text for key, text in (file.metadata() or {}).items() if key == "config"}
                return {name: file.get_tensor(name) for name in file.keys()} | options  # noqa: SIM118  # no mapping
        # Not by its name, which decides on the format too.
        with torch.serialization.safe_globals([*_PLAIN_STAND_INS]), path.open("rb") as opened:
            checkpoint = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise almost anything
        size = f"{path.stat().st_size} bytes"
        raise ValueError(f"{path} ({size}) cannot be read as a checkpoint: {_cause(path, error)}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a mapping of names to tensors")
    if checkpoint.get("world_size", 1) != 1:
        raise ValueError(
            f"{path} is one of {checkpoint['world_size']} rank files of a training run and holds parts of tensors: "
            f"give the run's eval/training_*/teacher_checkpoint.pth instead"
        )
    return checkpoint


def _newest_teacher(path: Path, before: str = "") -> str:
    """The newest teacher of the run whose folder this is, or lies above it, after some words; empty for none."""
    for folder in (path, *path.parents[:3]):
        teachers = list(folder.glob("eval/training_*/teacher_checkpoint.pth"))
        if teachers:
            return f"{before}{max(teachers, key=lambda teacher: (len(teacher.parent.name), teacher.parent.name))}"
    return ""


# Options of a training, which published checkpoints carry beside their weights: a class that only holds values.
_PLAIN_STAND_INS = ((types.SimpleNamespace, "argparse.Namespace"),)


def _is_safetensors(path: Path) -> bool:
    """By content: the length of a header, then the header, which is JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    is_one = len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
    return is_one or (path.suffix == ".safetensors" and not zipfile.is_zipfile(path))


def _shards(index: Path) -> Iterator[Path]:
    """The files of an index, each once.

    Raises:
        FileNotFoundError: when one of them is missing.
        ValueError: when it is no index, or names files elsewhere.
    """
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights: it lacks weight_map, names by parameter") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name.endswith(".index.json"):
            raise ValueError(f"{index} names {name!r}; its files lie beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not beside it; all {len(names)} files are needed")
        yield index.parent / name


def _cause(path: Path, error: Exception) -> str:
    """Why a file cannot be read, as far as its first bytes and the reader tell."""
    if kind := file_kind(path):
        return f"it is {kind}"
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds objects other than tensors and plain values ({match[1]}), which could run code. Where you trust "
            f"it, write its weights alone to a new file, with the package that made it: "
            f"torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        )
    return (
        f"it is truncated, not written by torch.save, or holds objects other than tensors and plain values "
        f"({type(error).__name__})"
    )


def _fit_position_embedding(
    model: DinoVisionTransformer,
    found: RenamedState,
    path: Path,
    source_grid: tuple[int, int] | None,
) -> tuple[Tensor, bool]:
    """The embedding on the model's grid, with a place for the class token, and whether it was resampled.

    Another layout or width is passed on for the shape check to report.
    """
    pos_embed = found.tensors["pos_embed"]
    if pos_embed.ndim != 3 or pos_embed.shape[-1] != model.embed_dim:
        return pos_embed, False
    count = pos_embed.shape[1]
    model_count = model.grid_size[0] * model.grid_size[1]
    others = 0 if found.lacks_class_position else 1
    if source_grid is None:
        side = math.isqrt(max(count - others, 0))
        source_grid = model.grid_size if count == others + model_count else (side, side)
    if source_grid[0] * source_grid[1] != count - others:
        raise ValueError(
            f"{path}: the position embedding has {count - others} patches, which is not a grid of {source_grid[0]} x "
            f"{source_grid[1]}; pass the (height, width) of its grid as source_grid"
        )
    if found.lacks_class_position:
        pos_embed = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)
    fitted = interpolate_position_embedding(
        pos_embed,
        source_grid,
        model.grid_size,
        antialias=model.interpolate_antialias,
        offset=model.interpolate_offset,
    )
    return fitted, fitted is not pos_embed
