"""Layouts of checkpoints: where the backbone is in a file, and what its parameters are called there.

Understood are released files, runs of ours, timm, Hugging Face (``Dinov2Model``, ``Dinov2WithRegistersModel``,
``ViTModel``), Lightning and LightlyTrain, each bare or nested, wrapped or not. Names are all that is looked at here;
what a parameter that is missing or left over means is decided in `dinov2.models.pretrained`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2.utils.param_groups import strip_wrappers

MAX_LISTED = 8

# Mere wrapping; names of other containers say which network it is and stay part of the parameter's name.
_WRAPPING = ("model", "state_dict")
# State of training, in which an optimiser may list tensors by the names of parameters.
_NO_NETWORK = re.compile(r"optim|sched|scaler|callback|loops|random|rng|loss", re.IGNORECASE)
_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
# What stands before the names by which a vision transformer is known.
_PLACE = re.compile(r"((?:[^.]+\.)*?)(?:(?:cls_token|pos_embed)$|patch_embed\.|blocks\.\d+\.)")
# Of several backbones in a file: the one that evaluation uses and that is released comes first.
_PREFERRED = (r"teacher", r"(^|[._])ema([._]|$)|momentum|averaged?", r"^(?!.*student)", r"student")
# Parts that stand beside the blocks of a backbone and that its features do not pass through.
_BESIDE = re.compile(
    r"(head|heads|head_dist|fc|classifier|pooler|pre_logits|masked_embed|projector|projection_head|predictor|prototypes"
    r"|last_layer|(dino|ibot|decode|linear|mlp)_head|decoder(_\w+)?)(\.|$)"
)

_HUGGING_FACE_MARK = re.compile(r"embeddings\.(patch_embeddings\.projection\.|position_embeddings$)")
_HUGGING_FACE = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"embeddings\.position_embeddings$", "pos_embed"),
        (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
        (r"(?:encoder\.layer|(?<![^.])layers)\.(\d+)\.", r"blocks.\1."),
        (r"attention\.attention\.query\.|attention\.q_proj\.", "attn.q."),
        (r"attention\.attention\.key\.|attention\.k_proj\.", "attn.k."),
        (r"attention\.attention\.value\.|attention\.v_proj\.", "attn.v."),
        (r"attention\.output\.dense\.|attention\.o_proj\.", "attn.proj."),
        (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
        (r"mlp\.weights_in\.", "mlp.w12."),
        (r"mlp\.(?:weights_out|down_proj)\.", "mlp.w3."),
        (r"(blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
        (r"(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"(?<![^.])layernorm\.", "norm."),
    )
)
# Layers that we keep in one matrix, one below the other.
_JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}
_OTHER_NAMES = (
    (re.compile(r"^reg_token$"), "register_tokens"),  # timm
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),  # iBOT, BEiT, DeiT III
)


@dataclass(frozen=True, kw_only=True)
class RenamedState:
    """A state dict under our names.

    Attributes:
        tensors: our name -> tensor.
        renamed: our name -> full name in the checkpoint, where the two differ.
        ignored: full names in the checkpoint that belong to something else, such as heads or the other network.
        prefix: what stood before the names of the backbone's parameters.
        layout: ``Hugging Face``, or empty for any other.
    """

    tensors: dict[str, Tensor]
    renamed: dict[str, str]
    ignored: tuple[str, ...]
    prefix: str = ""
    layout: str = ""

    @property
    def lacks_class_position(self) -> bool:
        """Whether the position embedding has entries for the patches alone, as timm's beside registers.

        The number of entries does not tell: k² of them may be k x k patches, or (k - 1) x (k + 1) and the class token.
        """
        return self.renamed.get("register_tokens", "").endswith("reg_token")


def unchunk_block_name(name: str) -> str:
    """Renames ``blocks.<chunk>.<index>.…`` to ``blocks.<index>.…``; other names stay as they are."""
    return _CHUNKED_BLOCK.sub("blocks.", name)


def listing(names: Iterable[str], separator: str = ", ", most: int = MAX_LISTED) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = len(names) - most
    return separator.join(names[:most]) + (f"{separator}and {more} more" if more > 0 else "")


def extract_backbone(checkpoint: Mapping[str, Any], prefix: str | None = None) -> RenamedState:
    """Picks the backbone out of a checkpoint and gives its parameters our names.

    A position embedding stays as it is: whether it has a place for the class token, which timm leaves out beside
    registers, shows only beside the network's grid.

    Args:
        checkpoint: what a file holds.
        prefix: what stands before the names of the backbone's parameters, such as ``model.net.``. By default it is
            found; of several backbones the teacher, or another averaged one, is taken before a student.

    Raises:
        ValueError: when there is no tensor in it, nothing has the prefix, several backbones are equally likely, or two
            parameters end up with one name.
    """
    flat = _flatten(checkpoint)
    if not flat:
        keys = listing(map(str, checkpoint)) or "none"
        raise ValueError(f"no parameter tensors in the checkpoint; its top-level keys: {keys}")
    names = {name: strip_wrappers(name) for name in flat}
    layout = ""
    if any(_HUGGING_FACE_MARK.search(name) for name in names.values()):
        layout = "Hugging Face"
        for pattern, ours in _HUGGING_FACE:
            names = {name: pattern.sub(ours, short) for name, short in names.items()}
    if prefix is None:
        prefix = _find_prefix(names.values())
    else:
        prefix = prefix.rstrip(".") + "." if prefix else ""
        if not any(name.startswith(prefix) for name in names.values()):
            raise ValueError(f"no parameter begins with the prefix {prefix!r}; there are {listing(names.values())}")

    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    ignored = [name for name in flat if not names[name].startswith(prefix)]
    has_decoder = any(name.removeprefix(prefix).startswith("decoder_") for name in names.values())
    for name, tensor in flat.items():
        if not names[name].startswith(prefix):
            continue
        ours = unchunk_block_name(names[name].removeprefix(prefix))
        for pattern, our_part in _OTHER_NAMES:
            if pattern.search(ours):
                ours = pattern.sub(our_part, ours)
        if _BESIDE.match(ours) or (ours == "mask_token" and has_decoder):  # of MAE, whose decoder has the mask token
            ignored.append(name)
            continue
        if ours in tensors:
            raise ValueError(f"two parameters of the checkpoint end up as {ours!r}: {origins[ours]!r}, {name!r}")
        tensors[ours], origins[ours] = tensor, name
    for whole, parts in _JOINED.items():
        _join(tensors, origins, whole, parts)
    _name_packed_gates(tensors, origins)
    renamed = {ours: name for ours, name in origins.items() if ours != name}
    return RenamedState(tensors=tensors, renamed=renamed, ignored=tuple(ignored), prefix=prefix, layout=layout)


def _flatten(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Collects tensors under dotted names."""
    flat: dict[str, Tensor] = {}
    for key, value in mapping.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping) and not _NO_NETWORK.search(str(key)):
            flat |= _flatten(value, prefix if key in _WRAPPING else f"{prefix}{key}.")
    return flat


def _find_prefix(names: Iterable[str]) -> str:
    places = Counter(match[1] for name in names if (match := _PLACE.match(name)))
    most = max(places.values(), default=0)
    candidates = [place for place, count in places.items() if 2 * count > most]
    for pattern in _PREFERRED:
        chosen = [place for place in candidates if re.search(pattern, place, re.IGNORECASE)]
        if len(chosen) > 1:
            raise ValueError(
                f"it holds {len(chosen)} backbones, under {' and '.join(map(repr, chosen))}: say which one by its "
                f"prefix, as in FILE:prefix={chosen[0].rstrip('.') or chosen[1].rstrip('.')}"
            )
        if chosen:
            return chosen[0]
    return ""


def _join(tensors: dict[str, Tensor], origins: dict[str, str], whole: str, parts: tuple[str, ...]) -> None:
    """Joins separate layers of a block in place, such as queries, keys and values."""
    for first in [name for name in tensors if f".{parts[0]}." in name]:
        pieces = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        joined = first.replace(f".{parts[0]}.", f".{whole}.")
        if all(piece in tensors for piece in pieces):
            origins[joined] = " + ".join(origins.pop(piece) for piece in pieces)
            tensors[joined] = torch.cat([tensors.pop(piece) for piece in pieces])


def _name_packed_gates(tensors: dict[str, Tensor], origins: dict[str, str]) -> None:
    """Names the two layers of a gated network as we do; timm calls them fc1 and fc2, as those of a plain one."""
    for first in [name for name in tensors if name.endswith(".mlp.fc1.weight")]:
        block = first.removesuffix("fc1.weight")
        second = tensors.get(f"{block}fc2.weight")
        if second is None or second.ndim != 2 or tensors[first].shape[0] != 2 * second.shape[1]:
            continue
        for theirs, ours in (("fc1", "w12"), ("fc2", "w3")):
            for kind in ("weight", "bias"):
                if f"{block}{theirs}.{kind}" in tensors:
                    tensors[f"{block}{ours}.{kind}"] = tensors.pop(f"{block}{theirs}.{kind}")
                    origins[f"{block}{ours}.{kind}"] = origins.pop(f"{block}{theirs}.{kind}")
