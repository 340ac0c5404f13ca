"""Finding the backbone in the layouts that checkpoints come in, and giving its parameters our names.

Everything here is a pure function of state dicts; nothing is read from disk.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dinov2.utils.parameter_names import strip_wrappers

# The teacher comes first: it is what evaluation uses and what is released.
CONTAINERS = ("teacher", "student", "model", "state_dict", "backbone")
BACKBONE_PREFIXES = ("teacher.backbone.", "teacher.", "student.backbone.", "student.", "backbone.")

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
    prefix = next((prefix for prefix in BACKBONE_PREFIXES if _any_starts_with(stripped.values(), prefix)), "")
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


def _any_starts_with(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


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
